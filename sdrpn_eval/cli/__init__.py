"""The command line `sdrpn-eval`; one module per command."""

from __future__ import annotations

import os
import sys

import typer

from sdrpn.cli.shared import report_errors
from sdrpn.io.extras import needs
from sdrpn_eval.cli.card import card
from sdrpn_eval.cli.compare import compare
from sdrpn_eval.cli.curve import curve
from sdrpn_eval.cli.gate import gate
from sdrpn_eval.cli.ladder import ladder
from sdrpn_eval.cli.replay import replay
from sdrpn_eval.cli.score import score
from sdrpn_eval.cli.sweep import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Results of lmms-eval that can be believed. First: lmms-eval --model llava_sdrpn "
    "--model_args pretrained=tiny --tasks tiny_vstar --output_path out/rpn --log_samples",
)


@app.callback()
def _main(context: typer.Context) -> None:
    if "--help" in sys.argv:  # of a command: nothing is needed to read it
        return
    with report_errors():
        needs("lmms_eval", "matplotlib", "jinja2", extra="eval", what="sdrpn-eval")
    # Tasks' documents are looked up on this machine; only what evaluates may download.
    if context.invoked_subcommand not in ("ladder", "sweep"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


for command in (compare, gate, score, replay, ladder, curve, sweep, card):
    app.command()(command)
