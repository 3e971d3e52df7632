"""Questions and their answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.io.images import as_shown, image_key


@dataclass(frozen=True)
class Question:
    """A question and its images.

    Questions with one image can zoom; those with none or several are answered by the stock model.

    Args:
        text: Text of the question, without `<image>`.
        images: Images of any mode, converted to RGB and rotated according to their EXIF data.
            Boxes and regions refer to the pixels of the converted images.
        box: Box to crop, in source pixels, instead of the proposer's.
        zoom: Zoom settings; default: the engine's.

    Raises:
        ValueError: If there is a box, but not exactly one image.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    box: PixelBox | None = None
    zoom: ZoomConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(as_shown(image) for image in self.images))
        if self.box is not None and len(self.images) != 1:
            raise ValueError(f"a box needs one image to crop, got {len(self.images)}")

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """Content hash of each image, see `image_key`."""
        return tuple(image_key(image) for image in self.images)


@dataclass(frozen=True)
class Answer:
    """An answer and how it was obtained.

    Args:
        text: The answer.
        regions: Crops, in source pixels; empty without a zoom.
        roi_map: [rows, columns] float32 in [0, 1], blurred; None if the proposer has no map.
        reason: Why there was no zoom; None if there was one.
        image_tokens: Number of image tokens.
        crop_tokens: Number of crop tokens.
        question_tokens: Number of text tokens after the image.
        new_tokens: Number of generated tokens.
        seconds: The batch's time divided by its number of questions.
        confidence: Smallest probability of a token of the answer without a zoom; None without
            `ZoomConfig.gate`.
        gate: The learned gate's probability that a zoom helps; None if the RPN has no gate.
        first_tokens: Number of tokens of the answer without a zoom, if the gate asked for one.
        encoded_tokens: Number of tokens that the image encoder computed for crops.
        kept_tokens: Number of image tokens that the upper layers saw; None for all.
    """

    text: str
    regions: tuple[PixelBox, ...]
    roi_map: np.ndarray | None
    reason: str | None
    image_tokens: int
    crop_tokens: int
    question_tokens: int
    new_tokens: int
    seconds: float = 0.0
    confidence: float | None = None
    gate: float | None = None
    first_tokens: int = 0
    encoded_tokens: int = 0
    kept_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object, without the map.

        Returns:
            A dict with regions as [x0, y0, x1, y1] in source pixels.
        """
        gates = {"confidence": self.confidence, "gate": self.gate}
        return {
            "answer": self.text,
            "regions": [[int(edge) for edge in box] for box in self.regions],
            "no_zoom": self.reason,
            "tokens": {
                "image": self.image_tokens,
                "crop": self.crop_tokens,
                "question": self.question_tokens,
                "new": self.new_tokens,
            },
            "seconds": round(self.seconds, 4),
            **{name: round(value, 4) for name, value in gates.items() if value is not None},
        }
