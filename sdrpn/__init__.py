"""SD-RPN for LLaVA-1.5: a second, closer look at the region where the answer is."""

from sdrpn.config import LabelConfig, RPNConfig, ZoomConfig
from sdrpn.rpn import RPN
from sdrpn.zoom import Answer, Question, ZoomLlava

__version__ = "0.1.0"

__all__ = ["RPN", "Answer", "LabelConfig", "Question", "RPNConfig", "ZoomConfig", "ZoomLlava"]
