"""`sdrpn look`: what the model sees, as a picture and as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from sdrpn import model_registry as names
from sdrpn.cli.shared import (
    DtypeOption,
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

if TYPE_CHECKING:
    from sdrpn.engine import ZoomModel


def look(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: ModelOption = names.LLAVA_7B,
    rpn: RpnOption = None,
    rpn_revision: RpnRevisionOption = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("look.png"),
    proposer: ProposerOption = "rpn",
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
) -> None:
    """Ask one question twice, stock and with the second look, and draw where it looked.

    Example: sdrpn look scene.png "what pattern is on the red disc ?" --model tiny
    """
    picture = open_image(image)
    with report_errors(weights_hint(model)):
        zoom = load_zoom(model, rpn, proposer, threshold, policy, dtype, padding, rpn_revision)
        text, path = _look(zoom, picture, question, out)
    say(text)
    say(f"picture: {path}")


def _look(zoom: ZoomModel, picture: Image.Image, question: str, out: Path) -> tuple[str, Path]:
    # Imported here, so that --help and a wrong path answer at once.
    from sdrpn.draw import Card, sheet
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
    lines += [f"looked at (x0, y0, x1, y1 in pixels): {boxes}"]
    if answer.roi_map is not None:
        peak = answer.roi_map.max()
        lines.append(f"map maximum: {peak:.3f}, threshold {zoom.zoom.threshold:g}")
    lines.append(f"tokens: {answer.image_tokens} image, {answer.crop_tokens} crop")
    return "\n".join(lines), sheet([card], out)
