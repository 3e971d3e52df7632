"""`python -m sdrpn_eval`, the same as `sdrpn-eval`."""

from sdrpn_eval.cli import app

app(prog_name="sdrpn-eval")
