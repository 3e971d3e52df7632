"""The `sdrpn` command line, one module per command."""

from __future__ import annotations

import typer

from sdrpn.cli.answer import answer
from sdrpn.cli.app_command import app_command
from sdrpn.cli.convert import convert
from sdrpn.cli.heads import heads
from sdrpn.cli.label import label, relabel
from sdrpn.cli.look import look
from sdrpn.cli.train import train
from sdrpn.cli.train_gate import train_gate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Zoom into the region of an image that a question is about, with a LLaVA-1.5. Evaluate "
    "with: lmms-eval --model llava_sdrpn ...",
)
app.command()(look)
app.command()(answer)
app.command("app")(app_command)
app.command()(heads)
app.command()(label)
app.command()(relabel)
# `train` also accepts the fields of TrainingArguments.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command()(train_gate)
app.add_typer(convert, name="convert")
