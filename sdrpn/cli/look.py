"""`sdrpn look`: what the model sees, as a picture and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from sdrpn import names
from sdrpn.cli.shared import MODEL_HELP, errors_as_sentences, open_image, say, weights_hint
from sdrpn.config import POLICIES, PROPOSERS


def look(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = names.LLAVA_7B,
    rpn: Annotated[
        str | None, typer.Option(help="RPN: a folder or a hub id; `tiny` brings its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("look.png"),
    proposer: Annotated[str, typer.Option(help=f"One of {', '.join(PROPOSERS)}.")] = "rpn",
    threshold: Annotated[
        float | None, typer.Option(help="On the map, in (0, 1); default: the RPN's own.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(POLICIES)}; default: the RPN's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask one question twice, stock and with the second look, and draw where it looked.

    Example: sdrpn look scene.png "what pattern is on the red disc ?" --model tiny
    """
    picture = open_image(image)
    with errors_as_sentences(weights_hint(model)):
        text, path = _look(picture, question, model, rpn, out, proposer, threshold, policy, dtype)
    say(text)
    say(f"picture: {path}")


def _look(
    picture: Image.Image,
    question: str,
    model: str,
    rpn: str | None,
    out: Path,
    proposer: str,
    threshold: float | None,
    policy: str | None,
    dtype: str,
) -> tuple[str, Path]:
    # Imported here, so that --help and a wrong path answer at once.
    from dataclasses import replace

    from sdrpn.draw import Card, sheet
    from sdrpn.zoom import Question, ZoomLlava

    if proposer == "rpn":
        rpn = rpn or names.PUBLISHED_RPN.get(model)
    folder, network = names.resolve(model, rpn)
    zoom = ZoomLlava.from_pretrained(folder, network, proposer=proposer, dtype=dtype)
    chosen = {"threshold": threshold, "policy": policy}
    settings = replace(zoom.zoom, **{k: v for k, v in chosen.items() if v is not None})
    answer = zoom.ask_batch([Question(question, (picture,), zoom=settings)])[0]
    stock = ZoomLlava(zoom.llava, proposer="none").ask(picture, question)
    answers = {"stock": stock.text, "second look": answer.text}
    card = Card(
        picture,
        question,
        answers,
        answer.regions,
        zoom.llava.view(picture),
        answer.roi_map,
        note=answer.reason or "",
    )
    boxes = ", ".join(str(tuple(box)) for box in answer.regions) or f"none ({answer.reason})"
    lines = [f"{name}: {text}" for name, text in answers.items()]
    lines += [f"looked at (x0, y0, x1, y1 in pixels): {boxes}"]
    if answer.roi_map is not None:
        lines.append(f"map maximum: {answer.roi_map.max():.3f}, threshold {settings.threshold:g}")
    lines.append(f"tokens: {answer.image_tokens} image, {answer.crop_tokens} crop")
    return "\n".join(lines), sheet([card], out)
