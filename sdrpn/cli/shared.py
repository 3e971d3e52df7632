"""Shared by the commands: options, console output, error reporting, loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.text import Text

from sdrpn import model_registry
from sdrpn.config import POLICIES, PROPOSERS, ZoomConfig
from sdrpn.io.extras import MissingExtra
from sdrpn.io.plurals import counted

if TYPE_CHECKING:
    from sdrpn.engine import ZoomModel

MODEL_HELP = "LLaVA-1.5 or Qwen2.5-VL: a folder, a Hub id, or an embedded one: `tiny-trio`, `tiny`."

ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
RpnOption = Annotated[
    str | None, typer.Option(help="RPN: a folder or Hub id; embedded models include their own.")
]
RpnRevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the RPN's Hub id.")
]
ProposerOption = Annotated[str, typer.Option(help=f"One of {', '.join(PROPOSERS)}.")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Threshold on the map, in (0, 1); default: the RPN's own.")
]
PolicyOption = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(POLICIES)}; default: the RPN's own.")
]
PaddingOption = Annotated[
    str | None,
    typer.Option(
        help="pad the image to a square, or crop its centre; default: image_aspect_ratio in "
        "config.json, else pad."
    ),
]
MinPixelsOption = Annotated[
    int | None,
    typer.Option(
        help="Qwen2.5-VL: minimum size of a resized image or crop, 784 pixels per token; default: "
        "451584, 576 tokens."
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(help="Qwen2.5-VL: maximum size of a resized image or crop; default: 451584."),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

console = Console()


def fail(message: str) -> typer.Exit:
    """Print an error to stderr and return the exception that ends the command with exit code 2."""
    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def report_errors(hint: str = "") -> Iterator[None]:
    """Report OSError and ValueError as one sentence without a traceback.

    Args:
        hint: Appended to the message.

    Raises:
        typer.Exit: With exit code 2.
    """
    try:
        yield
    except (OSError, ValueError, MissingExtra) as error:
        raise fail(f"{error}{hint}") from None


def weights_hint(model: str) -> str:
    """Return a hint for errors about a model that has to be downloaded."""
    if model in model_registry.known():
        return ""
    return "\nFor a first try without weights: --model tiny"


def load_zoom(
    model: str,
    rpn: str | None,
    proposer: str,
    threshold: float | None,
    policy: str | None,
    dtype: str,
    padding: str | None = None,
    rpn_revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> ZoomModel:
    """Load the engine with the command-line options of these names.

    Raises:
        ValueError: If an option is invalid or not the model family's, before weights are loaded.
        OSError: If files are missing or cannot be fetched.
    """
    given = {"threshold": threshold, "policy": policy}
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    ZoomConfig(**chosen)  # validate before weights are loaded
    # Imported here to keep --help and path errors fast.
    from sdrpn.backbones.llava15 import check_padding
    from sdrpn.engine import ZoomModel

    check_padding(padding)
    if proposer == "rpn":
        rpn = rpn or model_registry.PUBLISHED_RPN.get(model)
    folder, rpn_folder = model_registry.resolve(model, rpn)
    zoom = ZoomModel.from_pretrained(
        folder,
        rpn_folder,
        proposer=proposer,
        dtype=dtype,
        padding=padding,
        rpn_revision=rpn_revision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    zoom.zoom = replace(zoom.zoom, **chosen)
    zoom.backbone.name = model
    return zoom


def check_images(images: Path | None) -> None:
    """Raise ValueError if the --images folder does not exist."""
    if images is not None and not images.is_dir():
        raise ValueError(
            f"there is no folder {images}; give the one that image paths are relative to"
        )


def print_label_summary(found: Mapping[str, Any]) -> None:
    """Print the summary of a labels folder: labelled and ignored questions."""
    say(f"{found['kept']} of {counted(found['questions'], 'question')} gave labels")
    for reason, count in found["ignored"].items():
        say(f"  ignored, {reason}: {count}")


def open_image(path: Path) -> Image.Image:
    """Load an image file as RGB, or end the command with an error."""
    # Imported here to keep --help fast.
    from sdrpn.io.images import load_image

    with report_errors():
        return load_image(path)


def say(text: str) -> None:
    """Print text without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
