"""Optional dependencies: what an extra brings is looked for before it is imported."""

from __future__ import annotations

from importlib.util import find_spec

DISTRIBUTIONS = {"lmms_eval": "lmms-eval", "sklearn": "scikit-learn"}
"""Names on the package index, where they differ from the module's."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def needs(*modules: str, extra: str, what: str) -> None:
    """Checks that optional modules are installed, without importing them.

    Args:
        modules: Top-level modules that the extra brings.
        extra: The extra of this package, such as `train`.
        what: What needs them, as the message's subject: `sdrpn look --out`.

    Raises:
        MissingExtra: A module is missing; the message says what to install.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {', '.join(missing)}: pip install 'sdrpn[{extra}]'")
