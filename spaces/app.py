"""A Space: `sdrpn app` with the model that the Space's variables name."""

import os

from sdrpn.cli import app

words = ["app", "--model", os.environ.get("SDRPN_MODEL", "tiny")]
if rpn := os.environ.get("SDRPN_RPN"):
    words += ["--rpn", rpn]
app(words)
