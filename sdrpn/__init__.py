"""SD-RPN: a second, closer look at the region of an image where the answer is."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdrpn.config import LabelConfig, RPNConfig, ZoomConfig
    from sdrpn.engine import Answer, Question, ZoomModel
    from sdrpn.rpn.checkpoint import RPN

__version__ = "0.1.0"

__all__ = ["RPN", "Answer", "LabelConfig", "Question", "RPNConfig", "ZoomConfig", "ZoomModel"]

_MODULES = {
    **dict.fromkeys(("LabelConfig", "RPNConfig", "ZoomConfig"), "sdrpn.config"),
    "RPN": "sdrpn.rpn.checkpoint",
    **dict.fromkeys(("Answer", "Question", "ZoomModel"), "sdrpn.engine"),
}


def __getattr__(name: str) -> Any:
    # Imported when they are first used: a command's --help must not wait for torch.
    if name == "ZoomLlava":
        warnings.warn("ZoomLlava is now ZoomModel", DeprecationWarning, stacklevel=2)
        name = "ZoomModel"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
