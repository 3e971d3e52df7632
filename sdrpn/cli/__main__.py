"""`python -m sdrpn.cli`, which is also how accelerate and torchrun start a command."""

from sdrpn.cli import app

app(prog_name="sdrpn")
