"""Runs properties for as long as it is told, and counts what it tried and what it found.

A property fails where the code under it does anything but work or refuse in a sentence.
tests/test_fuzz.py runs each on a few examples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROUND = 500
"""Examples of one property before the next one's turn; each round has a seed of its own."""

LOOSE = settings(
    max_examples=ROUND,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    print_blob=False,
)


@dataclass(frozen=True)
class Property:
    """What must hold of all that the strategies can make."""

    test: Callable[..., None]
    strategies: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.test.__name__

    def trial(self, chosen: settings, count: Callable[[], None] = lambda: None) -> Any:
        """A hypothesis test of so many examples; count: called for each."""

        def tried(**arguments: Any) -> None:
            count()
            self.test(**arguments)

        tried.__name__ = tried.__qualname__ = self.name
        return chosen(given(**self.strategies)(tried))


def holds(**strategies: Any) -> Callable[[Callable[..., None]], Property]:
    """Makes a Property of a function."""
    return lambda test: Property(test, strategies)


def main(properties: Sequence[Property], description: str) -> None:
    """The command line of a fuzzing script; ends with 1 where something was found."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=10, help="how long, all in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", default="", help="one property, by name")
    parser.add_argument(
        "--atheris",
        action="store_true",
        help="let coverage guide the examples of the property --only (pip install atheris)",
    )
    arguments = parser.parse_args()
    chosen = [one for one in properties if arguments.only in ("", one.name)]
    if not chosen:
        parser.error(f"--only must be one of {', '.join(one.name for one in properties)}")
    if arguments.atheris:
        guided(chosen[0], arguments.minutes)
    sys.exit(bool(run(chosen, arguments.minutes * 60, arguments.seed)))


def run(properties: Sequence[Property], seconds: float, first_seed: int) -> int:
    """Run properties in turn until the time is up; prints the counts, returns the findings."""
    examples: Counter[str] = Counter()
    findings: dict[tuple[str, str], str] = {}
    started, number = time.monotonic(), first_seed
    while time.monotonic() - started < seconds:
        for one in properties:
            _round(one, number, examples, findings)
        number += 1
    for name, count in examples.items():
        print(f"{name}: {count:,} examples, {sum(k[0] == name for k in findings)} findings")
    minutes = (time.monotonic() - started) / 60
    print(f"all: {examples.total():,} examples in {minutes:.1f} min, {len(findings)} findings")
    for (name, where), told in findings.items():
        print(f"\n{name}, {where}:\n{told}")
    return len(findings)


def _round(
    one: Property, number: int, examples: Counter[str], findings: dict[tuple[str, str], str]
) -> None:
    try:
        seed(number)(one.trial(LOOSE, lambda: examples.update([one.name])))()
    except Exception as error:
        for each in error.exceptions if isinstance(error, ExceptionGroup) else [error]:
            last = traceback.extract_tb(each.__traceback__)[-1]
            where = f"{type(each).__name__} in {Path(last.filename).name}:{last.lineno}"
            notes = "\n".join(getattr(each, "__notes__", []))
            findings.setdefault((one.name, where), f"{each}\n{notes}"[:3000])


def guided(one: Property, minutes: float) -> None:
    """Run one property with atheris, which looks for examples that reach new code, and end.

    It follows the code that is loaded by now.
    """
    import atheris

    atheris.instrument_all()
    words = [sys.argv[0], f"-max_total_time={round(minutes * 60)}", "-max_len=65536"]
    atheris.Setup(words, one.trial(LOOSE).hypothesis.fuzz_one_input)
    atheris.Fuzz()


def refused(error: Exception, *words: str) -> None:
    """Check that what was raised is a sentence with these words in it."""
    missing = [word for word in words if word not in str(error)]
    if missing or not str(error):
        raise AssertionError(f"{missing} not in {type(error).__name__}: {error}") from error


# What is put in

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, -(10**30)])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["", "\0", "\ud800", "../x", "/etc/passwd", "<script>", "x" * 2000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
"""Anything that JSON can spell, NaN and half surrogates too."""

ODD_TEXTS = st.sampled_from(
    [b"", b"\n", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\0", b"1" * 5000, b"{}"]
)
"""Whole files that are none: empty, nested without end, no UTF-8, numbers without end."""


@st.composite
def harmed(draw: st.DrawFn, content: Any) -> bytes:
    """JSON text of a value after a change or two to it, or to its text."""
    value = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(0, 2))):
        value = _changed(draw, value)
    return draw(cut(json.dumps(value).encode()))


def _changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one of its parts exchanged, left out, or under another name."""
    holder: dict[Any, Any] = {"": value}
    parent, key = holder, ""
    while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 5)):
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 3)) or parent is holder:
        parent[key] = draw(JSON)
    elif isinstance(parent, dict) and draw(st.booleans()):
        parent[draw(st.text(max_size=8))] = parent.pop(key)
    else:
        del parent[key]
    return holder[""]


@st.composite
def cut(draw: st.DrawFn, content: bytes, most: int = 2) -> bytes:
    """Bytes after a few harms: cut off, a byte changed, a part left out or doubled."""
    if not draw(st.integers(0, 20)):
        return draw(ODD_TEXTS)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(content)))
        end = min(at + draw(st.integers(0, 64)), len(content))
        harm = draw(st.sampled_from(["cut", "byte", "left out", "doubled", "put in"]))
        if harm == "cut":
            content = content[:at]
        elif harm == "byte":
            content = content[:at] + draw(st.binary(max_size=1)) + content[at + 1 :]
        elif harm == "left out":
            content = content[:at] + content[end:]
        elif harm == "doubled":
            content = content[:end] + content[at:]
        else:
            content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
    return content
