"""`python -m sdrpn.cli`, the entry point for accelerate and torchrun."""

from sdrpn.cli import app

app(prog_name="sdrpn")
