"""The command line: `sdrpn look` shows what the model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, UnidentifiedImageError
from rich.console import Console

from sdrpn import names
from sdrpn.config import POLICIES, PROPOSERS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A second, closer look for LLaVA-1.5. Evaluate with: lmms-eval --model llava_sdrpn ...",
)
console = Console()


@app.callback()
def _root() -> None:
    """Keeps `look` a subcommand while it is the only one."""


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False)
    return typer.Exit(2)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise _fail(f"there is no image at {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise _fail(f"{path} cannot be read as an image: {error}") from None


@app.command()
def look(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str, typer.Option(help="LLaVA-1.5: a folder, a hub id, or `tiny`, the embedded toy.")
    ] = "llava-hf/llava-1.5-7b-hf",
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
    picture = _open(image)
    try:
        text, path = _look(picture, question, model, rpn, out, proposer, threshold, policy, dtype)
    except (OSError, ValueError) as error:
        hint = "" if model in names.known() else "\nFor a first try without weights: --model tiny"
        raise _fail(f"{error}{hint}") from None
    console.print(text, highlight=False, markup=False)
    console.print(f"picture: {path}", highlight=False, markup=False)


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
