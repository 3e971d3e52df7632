# /// script
# requires-python = ">=3.11"
# dependencies = ["sdrpn[eval]"]
# ///
"""Rows of the paper's table: stock, ViCrop and SD-RPN on nine benchmarks, compared.

Everything is in one folder: results, records, logs, comparison.html. The same command resumes after
an interruption. Options are those of `sdrpn-eval ladder`; a later one replaces an earlier one:

    python jobs/row.py --out out/7b
    python jobs/row.py --out out/13b --model_args pretrained=llava-hf/llava-1.5-13b-hf
"""

import sys

from sdrpn_eval.cli import app

ROW = ["--tasks", "sdrpn_paper", "--proposers", "none,vicrop,rpn"]
ROW += ["--model_args", "pretrained=llava-hf/llava-1.5-7b-hf"]
ROW += ["--batch-size", "8", "--processes", "auto"]

app(["ladder", *ROW, *sys.argv[1:]])
