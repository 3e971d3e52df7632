"""`make demo`, which is `python -m sdrpn_eval.demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdrpn.io.extras import MissingExtra, needs


def main() -> None:
    """Reads the command line and runs the demo."""
    parser = argparse.ArgumentParser(prog="sdrpn_eval.demo", description="Stock and second look.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="output folder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="first documents only, for a quick try")
    args = parser.parse_args()
    try:
        needs("lmms_eval", "matplotlib", "jinja2", extra="eval", what="the demo")
        # Imported here, because it imports what the extra brings.
        from sdrpn_eval.demo.run import demo

        demo(args.out, batch_size=args.batch_size, limit=args.limit)
    except (MissingExtra, ValueError) as error:  # a run that failed, or cannot be compared
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
