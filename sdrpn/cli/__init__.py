"""The command line: `sdrpn look` and its like, one module a command."""

from __future__ import annotations

import typer

from sdrpn.cli.answer import answer
from sdrpn.cli.convert import convert
from sdrpn.cli.heads import heads
from sdrpn.cli.label import label, relabel
from sdrpn.cli.look import look
from sdrpn.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A second, closer look for LLaVA-1.5. Evaluate with: lmms-eval --model llava_sdrpn ...",
)
app.command()(look)
app.command()(answer)
app.command()(heads)
app.command()(label)
app.command()(relabel)
# Fields of TrainingArguments follow the options of its own.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.add_typer(convert, name="convert")
