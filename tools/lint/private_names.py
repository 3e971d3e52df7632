"""Private names of other libraries are touched only where tests say what breaks without them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_private_names import ROOT, TOUCHED, Touched, sources


@pytest.mark.parametrize("touched", TOUCHED, ids=lambda t: t.name)
def test_it_is_touched_where_it_is_said_to_be(touched: Touched) -> None:
    for file in touched.files:
        assert touched.name in (ROOT / file).read_text(encoding="utf-8"), file


def own_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a file makes itself: functions, classes, attributes, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


def foreign_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a file reads or writes on something, or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_every_private_name_is_listed() -> None:
    trees = dict(sources())
    own = {name for tree in trees.values() for name in own_names(tree)}
    # A base class' attributes that a subclass sets are the base's own.
    own -= {"_rank", "_world_size"}
    known = own | {t.name for t in TOUCHED} | {"_world_size", "_resolve_system_prompt"}
    unlisted = {
        f"{name} in {file}"
        for file, tree in trees.items()
        for name in foreign_names(tree)
        if name.startswith("_") and not name.startswith("__") and name not in known
    }
    assert not unlisted, "touch these in no file, or list them in TOUCHED with what they break"
