"""What the commands share: the console, errors of one sentence, files."""

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

from sdrpn import model_registry as names
from sdrpn.config import POLICIES, PROPOSERS, ZoomConfig
from sdrpn.io.plurals import counted

if TYPE_CHECKING:
    from sdrpn.engine import ZoomModel

MODEL_HELP = "LLaVA-1.5: a folder, a hub id, or `tiny`, the embedded toy."

ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
RpnOption = Annotated[
    str | None, typer.Option(help="RPN: a folder or a hub id; `tiny` brings its own.")
]
RpnRevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the RPN's hub id.")
]
ProposerOption = Annotated[str, typer.Option(help=f"One of {', '.join(PROPOSERS)}.")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="On the map, in (0, 1); default: the RPN's own.")
]
PolicyOption = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(POLICIES)}; default: the RPN's own.")
]
PaddingOption = Annotated[
    str | None,
    typer.Option(
        help="pad (the whole image on a square) or crop (its centre); default: as config.json "
        "notes in image_aspect_ratio, else pad."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

console = Console()


def fail(message: str) -> typer.Exit:
    """Say on stderr what was wrong; raise what returns, and the command ends with 2."""
    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def report_errors(hint: str = "") -> Iterator[None]:
    """Wrong values and files end the command with what they say, and a hint; no traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise fail(f"{error}{hint}") from None


def weights_hint(model: str) -> str:
    """What to try first, for an error about a model that has to be fetched."""
    return "" if model in names.known() else "\nFor a first try without weights: --model tiny"


def load_zoom(
    model: str,
    rpn: str | None,
    proposer: str,
    threshold: float | None,
    policy: str | None,
    dtype: str,
    padding: str | None = None,
    rpn_revision: str | None = None,
) -> ZoomModel:
    """The engine that the options of these names ask for."""
    given = {"threshold": threshold, "policy": policy}
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    ZoomConfig(**chosen)  # wrong ones are told before the weights are loaded
    # Imported here, so that --help and a wrong path answer at once.
    from sdrpn.backbones.llava15 import check_padding
    from sdrpn.engine import ZoomModel

    check_padding(padding)
    if proposer == "rpn":
        rpn = rpn or names.PUBLISHED_RPN.get(model)
    folder, network = names.resolve(model, rpn)
    zoom = ZoomModel.from_pretrained(
        folder,
        network,
        proposer=proposer,
        dtype=dtype,
        padding=padding,
        rpn_revision=rpn_revision,
    )
    zoom.zoom = replace(zoom.zoom, **chosen)
    zoom.backbone.name = model
    return zoom


def check_images(images: Path | None) -> None:
    """Refuse an --images folder that is not there."""
    if images is not None and not images.is_dir():
        raise ValueError(f"there is no folder {images}; give the one the image paths start from")


def print_label_summary(found: Mapping[str, Any]) -> None:
    """Print how many questions gave labels, and why the others did not: a folder's summary."""
    say(f"{found['kept']} of {counted(found['questions'], 'question')} gave labels")
    for reason, count in found["ignored"].items():
        say(f"  ignored, {reason}: {count}")


def open_image(path: Path) -> Image.Image:
    """An image file as RGB; ends the command with a sentence that names the file."""
    # Imported here, so that --help answers at once.
    from sdrpn.io.images import load_image

    with report_errors():
        return load_image(path)


def say(text: str) -> None:
    """Print a line as it stands."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
