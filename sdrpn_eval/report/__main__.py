"""`python -m sdrpn_eval.report`, the same as `sdrpn-eval`."""

from sdrpn_eval.report.cli import app

app(prog_name="sdrpn-eval")
