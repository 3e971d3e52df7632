"""The page of `sdrpn app`: one question, answered by the stock model and with the second look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra `app`
import numpy as np
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.config import PEAK, POLICIES, PROPOSERS, ZoomConfig
from sdrpn.draw import Card, overview
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.io.images import BadImage, load_image, safe_join
from sdrpn.model_registry import Example

CONTROLS: Mapping[str, Callable[[Any], gr.Component]] = {
    "threshold": lambda value: gr.Textbox(
        str(value),
        label="Threshold",
        info=f"on the map, or {PEAK}, relative to its peak; higher: smaller regions",
    ),
    "policy": lambda value: gr.Dropdown(
        list(POLICIES), value=value, label="Policy", info="from the map to a crop"
    ),
    "crop_tokens": lambda value: gr.Number(
        value or 0,
        precision=0,
        label="Crop tokens",
        info="at most; 0: as many as the context holds",
    ),
}
"""Fields of `ZoomConfig` that have a control of their own: its component for a value. A number of
0 stands for None."""

COUNTS: Mapping[str, Callable[[Answer], Any]] = {
    "map maximum": lambda answer: None if answer.roi_map is None else f"{answer.roi_map.max():.3f}",
    "image tokens": lambda answer: answer.image_tokens,
    "crop tokens": lambda answer: answer.crop_tokens,
    "question tokens": lambda answer: answer.question_tokens,
    "new tokens": lambda answer: answer.new_tokens,
    "seconds": lambda answer: round(answer.seconds, 2),
}
"""Rows of the table below the answers."""

INTRODUCTION = """# A second look
The stock model sees the whole image once. With **sdrpn** it also gets a full-resolution crop of the
region that the question is about."""


def read_upload(upload: Mapping[str, Any] | None, folder: Path) -> Image.Image:
    """Decode an uploaded image as every other command does, with `load_image`.

    Args:
        upload: What the page sends for an image: `path`, and `orig_name`, its name at the user's.
        folder: Folder of all uploads.

    Raises:
        BadImage: If there is no image, it cannot be used, or it lies outside `folder`.
    """
    if upload is None:
        raise BadImage("missing", "Image", "drop one, or click an example")
    path = safe_join(folder, str(upload.get("path")))
    name = upload.get("orig_name") or path.name
    if not path.is_file():
        raise BadImage("missing", name)
    return load_image(path.read_bytes(), name=name)


class SideBySide:
    """A model that is asked with and without the second look.

    Args:
        zoom: The engine. Its prefix cache is not used, so that the seconds of all answers include
            the prefill of the image.
    """

    def __init__(self, zoom: ZoomModel) -> None:
        self.zoom = zoom
        self.proposers = [name for name in PROPOSERS if name != "rpn" or zoom.rpn is not None]
        self.engines = {name: self._engine(name) for name in self.proposers}

    def _engine(self, proposer: str) -> ZoomModel:
        return ZoomModel(
            self.zoom.backbone,
            self.zoom.rpn,
            proposer=proposer,
            zoom=self.zoom.zoom,
            labels=self.zoom.models.labels,
            prefix_cache=0,
        )

    def warm_up(self) -> None:
        """Ask once, since the first answers of a process take longer than later ones."""
        image = Image.new("RGB", (64, 64), "white")
        self.ask(image, "what is this ?", self.zoom.proposer, self.zoom.zoom)

    def ask(
        self, image: Image.Image, question: str, proposer: str, zoom: ZoomConfig
    ) -> tuple[Answer, Answer]:
        """Answer a question twice: by the stock model, and with a proposer's second look.

        Raises:
            ValueError: If there is no question or no such proposer; see `ZoomModel.ask_batch`.
        """
        if not question.strip():
            raise ValueError("there is no question: type one, or click an example")
        if proposer not in self.engines:
            known = ", ".join(self.engines)
            raise ValueError(f"proposer must be one of {known}, got {proposer!r}")
        asked = Question(question, (image,), zoom=zoom)
        (stock,) = self.engines["none"].ask_batch([asked])
        (second,) = self.engines[proposer].ask_batch([asked])
        return stock, second

    def draw(self, image: Image.Image, question: str, answer: Answer) -> Image.Image:
        """Draw the boxes of an answer and its map, scaled to its maximum, on its image."""
        extent = self.zoom.backbone.image_grid(image).extent
        seen = answer.roi_map
        if seen is not None:
            seen = seen / max(seen.max(), np.finfo(seen.dtype).tiny)
        return overview(Card(image, question, {}, answer.regions, extent, seen))


def chosen_zoom(base: ZoomConfig, values: Sequence[Any], more: str) -> ZoomConfig:
    """Combine the settings of the page.

    Args:
        base: The model's own settings.
        values: Values of `CONTROLS`, in this order.
        more: Further settings, as `ZoomConfig.from_text` parses them; they take precedence.

    Raises:
        ValueError: If a setting is unknown or invalid.
    """
    typed = ZoomConfig.from_text(more)
    own = dict(zip(CONTROLS, values, strict=True))
    own["threshold"] = ZoomConfig.from_text(f"threshold={own['threshold']}").threshold
    names = [part.partition("=")[0].strip() for part in more.split(",") if part.strip()]
    changed = {name: value or None for name, value in own.items()}
    changed |= {name: getattr(typed, name) for name in names}
    return ZoomConfig.from_dict(asdict(base) | changed)


def crops(image: Image.Image, boxes: Sequence[PixelBox]) -> list[tuple[Image.Image, str]]:
    """Cut boxes out of an image, each with a caption of its position in pixels."""
    return [(image.crop(box), ", ".join(str(int(edge)) for edge in box)) for box in boxes]


def build_page(
    model: SideBySide, examples: Sequence[Example], folder: Path, name: str
) -> gr.Blocks:
    """Build the page; one question at a time is answered, others wait in gradio's queue.

    Args:
        model: The model to ask.
        examples: Questions to click.
        folder: Gradio's temporary folder, where uploads and the images of examples are.
        name: Name of the model, as it was given.
    """

    def ask(upload: Any, question: str, proposer: str, more: str, *values: Any) -> tuple:
        try:
            image = read_upload(upload, folder)
            zoom = chosen_zoom(model.zoom.zoom, values, more)
            stock, second = model.ask(image, question, proposer, zoom)
        except (OSError, ValueError) as error:
            # Stays on the page until it is closed.
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        table = [[row, count(stock), count(second)] for row, count in COUNTS.items()]
        picture = model.draw(image, question, second)
        why = f"No zoom: {second.reason}." if second.reason else ""
        return stock.text, second.text, picture, crops(image, second.regions), why, table

    # delete_cache: uploads and pictures of more than an hour ago, every hour.
    with gr.Blocks(
        title=f"sdrpn: {name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(f"{INTRODUCTION} Model: `{name}`.")
        with gr.Row():
            with gr.Column(scale=2):
                inputs = _inputs(model)
                button = gr.Button("Ask", variant="primary")
                if examples:
                    rows = [[_saved(one, folder), one.question] for one in examples]
                    gr.Examples(rows, inputs[:2], label="Examples")
            with gr.Column(scale=3):
                outputs = _outputs()
        gr.on(
            [button.click, inputs[1].submit],
            ask,
            inputs,
            outputs,
            api_name="ask",
            concurrency_limit=1,
            preprocess=False,  # `read_upload` decodes, so that a bad image is named
        )
    return page.queue(default_concurrency_limit=1)


def _inputs(model: SideBySide) -> list[Any]:
    image = gr.Image(label="Image", sources=["upload", "clipboard"], height=320)
    question = gr.Textbox("", label="Question", placeholder="What does the sign say?", max_lines=4)
    with gr.Accordion("Settings", open=False):
        proposer = gr.Dropdown(
            model.proposers, value=model.zoom.proposer, label="Proposer", info="finds the region"
        )
        own = model.zoom.zoom
        controls = [make(getattr(own, name)) for name, make in CONTROLS.items()]
        more = gr.Textbox("", label="More settings", placeholder="gate=0.9,min_cells=1")
    return [image, question, proposer, more, *controls]


def _outputs() -> list[Any]:
    with gr.Row():
        stock = gr.Textbox(label="Stock model")
        second = gr.Textbox(label="Second look")
    with gr.Row():
        picture = gr.Image(label="Map and regions", height=320, buttons=["fullscreen"])
        cut = gr.Gallery(
            label="Crops (x0, y0, x1, y1)",
            height=320,
            buttons=["fullscreen"],
            object_fit="contain",
        )
    why = gr.Markdown()
    table = gr.Dataframe(
        headers=["", "stock model", "second look"], label="Cost", interactive=False
    )
    return [stock, second, picture, cut, why, table]


def _saved(example: Example, folder: Path) -> str:
    path = folder / example.name
    path.write_bytes(example.image)
    return str(path)
