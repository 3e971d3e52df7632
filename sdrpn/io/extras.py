"""Optional dependencies: check that an extra is installed before importing it."""

from __future__ import annotations

from importlib.util import find_spec

DISTRIBUTIONS = {"lmms_eval": "lmms-eval", "sklearn": "scikit-learn"}
"""Distribution names that differ from the module name."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names its extra."""


def needs(*modules: str, extra: str, what: str) -> None:
    """Check that optional modules are installed, without importing them.

    Args:
        modules: Top-level modules of the extra.
        extra: The extra of this package, such as `train`.
        what: Subject of the message, such as `sdrpn look --out`.

    Raises:
        MissingExtra: If a module is missing, with the command to install it.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {', '.join(missing)}: pip install 'sdrpn[{extra}]'")
