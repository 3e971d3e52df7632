"""`sdrpn look`: draw the region that the model zooms into and print both answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from sdrpn import model_registry
from sdrpn.cli.shared import (
    DtypeOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    PaddingOption,
    PolicyOption,
    ProposerOption,
    RpnOption,
    RpnRevisionOption,
    ThresholdOption,
    load_zoom,
    open_image,
    report_errors,
    say,
    weights_hint,
)
from sdrpn.io.extras import MissingExtra, needs

if TYPE_CHECKING:
    from sdrpn.draw import Card
    from sdrpn.engine import ZoomModel

DEFAULT_OUT = Path("look.png")


def look(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: ModelOption = model_registry.LLAVA_7B,
    rpn: RpnOption = None,
    rpn_revision: RpnRevisionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture to write; default: look.png, if matplotlib is installed."),
    ] = None,
    proposer: ProposerOption = "rpn",
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Answer a question with the stock model and with zoom, and draw the region.

    Example: sdrpn look scene.png "what pattern is on the red disc ?" --model tiny
    """
    picture = open_image(image)
    with report_errors():
        if out is not None:
            needs("matplotlib", extra="plot", what=f"--out {out}")
    with report_errors(weights_hint(model)):
        zoom = load_zoom(
            *(model, rpn, proposer, threshold, policy, dtype),
            padding=padding,
            rpn_revision=rpn_revision,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        text, card = _look(zoom, picture, question)
        say(text)
        say(_drawn(card, out or DEFAULT_OUT))


def _drawn(card: Card, out: Path) -> str:
    from sdrpn.draw import sheet

    try:
        return f"picture: {sheet([card], out)}"
    except MissingExtra as error:
        return f"no picture: {error}"


def _look(zoom: ZoomModel, picture: Image.Image, question: str) -> tuple[str, Card]:
    # Imported here to keep --help and path errors fast.
    from sdrpn.draw import Card
    from sdrpn.engine import ZoomModel

    answer = zoom.ask(picture, question)
    stock = ZoomModel(zoom.backbone, proposer="none").ask(picture, question)
    answers = {"stock": stock.text, "second look": answer.text}
    card = Card(
        picture,
        question,
        answers,
        answer.regions,
        zoom.backbone.image_grid(picture).extent,
        answer.roi_map,
        note=answer.reason or "",
    )
    boxes = ", ".join(str(tuple(box)) for box in answer.regions) or f"none ({answer.reason})"
    lines = [f"{name}: {text}" for name, text in answers.items()]
    lines += [f"region (x0, y0, x1, y1 in pixels): {boxes}"]
    if answer.roi_map is not None:
        peak = answer.roi_map.max()
        lines.append(f"map maximum: {peak:.3f}, threshold {zoom.zoom.threshold_text}")
    lines.append(f"tokens: {answer.image_tokens} image, {answer.crop_tokens} crop")
    return "\n".join(lines), card
