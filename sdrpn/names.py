"""Short names of models that installed packages bring, by the entry-point group `sdrpn.models`.

An entry point names a function without arguments that returns (model folder, RPN folder).
"""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "sdrpn.models"


def resolve(model: str, rpn: str | None) -> tuple[str, str | None]:
    """Where a model and its RPN are; anything that is not a short name stays as it is."""
    for point in entry_points(group=GROUP, name=model):
        folder, own_rpn = point.load()()
        return folder, rpn or own_rpn
    return model, rpn


def known() -> list[str]:
    """The short names at hand."""
    return sorted(point.name for point in entry_points(group=GROUP))
