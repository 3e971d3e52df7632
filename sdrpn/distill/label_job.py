"""The labelling job: many questions, several processes, killed and started again at will.

The questions are cut into shards before anything runs, the same way however many processes there
are. A process takes its share of the shards that are not there yet and writes each when it is
complete, so nothing finished is lost or done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from pyarrow import ArrowException, parquet
from tqdm import tqdm

from sdrpn.config import KINDS, LabelConfig
from sdrpn.distill.label import NO_MAP, kind_of, label_batch, padding_of
from sdrpn.distill.label_dataset import (
    IMAGES_FOLDER,
    SETTINGS_FILE,
    image_root,
    label_row,
    load_labels,
    read_settings,
    read_shard,
    shard_path,
    shard_paths,
    summarise,
    write_shard,
)
from sdrpn.distill.pseudo_labels import FOREGROUND, label_cells
from sdrpn.draw import Card, sheet
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.atomic import atomic_write, remove_partial_files
from sdrpn.io.images import BadImage, image_key, load_image, safe_join
from sdrpn.io.questions import ImageQuestion
from sdrpn.io.resumable import BatchRunner, guard_settings
from sdrpn.roi.proposers import require_labels

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.05
"""More unreadable images than this are an error at the end: the image folder is likely wrong."""
BAD_IMAGE = "image "
"""How the reasons of rows begin whose image could not be used."""
READERS = 4
"""Threads that decode the images of the next batch."""

Place = tuple[int, int]
"""(shard, question in it)."""


class LabelJob:
    """Label `items` into the folder `out`; see `run`.

    images: the folder their paths start from; None where they came inside a data set. shard_size:
    questions a shard, the unit of restarting. kind: of all pictures, `natural` or `text`; None goes
    by their folders. about: what else was chosen, noted in the settings.
    Raises ValueError where `out` holds labels made with other settings, naming what differs.
    """

    def __init__(
        self,
        zoom: ZoomModel,
        items: Sequence[ImageQuestion],
        out: Path,
        *,
        images: Path | None,
        batch_size: int = 16,
        shard_size: int = 512,
        kind: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or shard_size < 1:
            raise ValueError(
                f"batch_size and shard_size must be above 0: {batch_size}, {shard_size}"
            )
        if kind not in (None, *KINDS):
            raise ValueError(f"kind must be {', '.join(KINDS)} or None, got {kind!r}")
        self.zoom, self.items, self.out, self.images, self.kind = zoom, items, out, images, kind
        self.batch_size, self.shard_size = batch_size, shard_size
        self.shards = -(-len(items) // shard_size)
        self.state = PartialState()
        self.settings = {
            "images": None if images is None else str(images.resolve()),
            "questions": len(items),
            "shards": self.shards,
            "shard_size": shard_size,
            "backbone": zoom.backbone.model_type,
            "image_tokens": zoom.backbone.rpn_shape()["image_tokens"],
            **zoom.backbone.preprocessing,
            "labels": asdict(require_labels(zoom.models)),
            **({} if kind is None else {"kind": kind}),
            **(about or {}),
        }

    def run(self) -> None:
        """Write every shard that is missing; returns when those of all processes are there."""
        if self.state.is_main_process:
            self._guard()
        self.state.wait_for_everyone()
        missing = [k for k in range(self.shards) if not self._is_whole(k)]
        # Nobody writes a shard before everybody has seen which are missing.
        self.state.wait_for_everyone()
        self._write(missing[self.state.process_index :: self.state.num_processes])
        self.state.wait_for_everyone()

    def _write(self, shards: Sequence[int]) -> None:
        runner = BatchRunner(
            prepare=self._open,
            run=self._label,
            recover=self._without_image,
            describe=lambda place: f"question {self._item(place).id!r}",
            batch_size=self.batch_size,
            remedy="label on a device with more memory, or with a smaller --dtype",
            workers=READERS,
        )
        alone = self.state.num_processes == 1
        progress = {
            "total": sum(len(self._items(k)) for k in shards),
            "desc": "Labelling" if alone else "Labelling (this process)",
            "unit": "question",
            "disable": not self.state.is_main_process,
        }
        batches = (batch for k in shards for batch in self._batches(k))
        rows: dict[int, dict[str, Any]] = {}
        with closing(runner(batches, **progress)) as results:
            for labelled in results:
                rows |= {number: row for (_, number), row in labelled}
                shard = labelled[0][0][0]
                if len(rows) == len(self._items(shard)):
                    write_shard([rows[i] for i in sorted(rows)], self._path(shard))
                    rows.clear()

    def _batches(self, shard: int) -> Iterator[list[Place]]:
        places = [(shard, number) for number in range(len(self._items(shard)))]
        for start in range(0, len(places), self.batch_size):
            yield places[start : start + self.batch_size]

    def _path(self, shard: int) -> Path:
        return shard_path(self.out, shard, self.shards)

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard is there with all its rows; says of one that is damaged that it is."""
        path = self._path(shard)
        if not path.exists():
            return False
        try:
            if parquet.read_metadata(path).num_rows == len(self._items(shard)):
                return True
        except (OSError, ArrowException):
            pass
        if self.state.is_main_process:
            logger.warning("%s is damaged and is made anew", path)
        return False

    def _items(self, shard: int) -> Sequence[ImageQuestion]:
        return self.items[shard * self.shard_size : (shard + 1) * self.shard_size]

    def _item(self, place: Place) -> ImageQuestion:
        shard, number = place
        return self._items(shard)[number]

    def _guard(self) -> None:
        """Note the settings; refuse a folder that was begun with others."""
        self.out.mkdir(parents=True, exist_ok=True)
        remove_partial_files(self.out)
        remove_partial_files(self.out / IMAGES_FOLDER)
        guard_settings(self.out / SETTINGS_FILE, self.settings)

    def _open(self, place: Place) -> tuple[str, Image.Image]:
        item = self._item(place)
        if item.content is not None:
            return self._keep(item.content(), str(item.id))
        assert self.images is not None
        return item.image, load_image(safe_join(self.images, item.image))

    def _keep(self, content: bytes, name: str) -> tuple[str, Image.Image]:
        """An image that came inside a data set, kept as a file that training can read."""
        image = load_image(content, name)
        file = f"{image_key(image)}.png"
        path = self.out / IMAGES_FOLDER / file
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as part:
                image.save(part, "PNG")
        return file, image

    def _label(
        self, places: Sequence[Place], opened: Sequence[tuple[str, Image.Image]]
    ) -> list[dict[str, Any]]:
        items = [self._item(place) for place in places]
        asked = [
            Question(i.question, (image,)) for i, (_, image) in zip(items, opened, strict=True)
        ]
        kinds = [self.kind or kind_of(item.image) for item in items]
        made = label_batch(self.zoom, asked, kinds)
        return [
            label_row(
                str(item.id),
                file,
                item.question,
                one.response,
                grounding=one.grounding,
                sink=one.sink,
                labels=one.labels,
                extent=one.grid.extent,
                size=image.size,
                reason=one.reason,
            )
            for item, (file, image), one in zip(items, opened, made, strict=True)
        ]

    def _without_image(self, place: Place, _: Any, error: Exception) -> dict[str, Any]:
        """The row of a question whose image cannot be used; raises any other error."""
        if not isinstance(error, BadImage):
            raise error
        item = self._item(place)
        return label_row(
            str(item.id), item.image, item.question, reason=f"{BAD_IMAGE}{error.reason}"
        )


def relabel(source: Path, out: Path, config: LabelConfig) -> None:
    """Make labels anew from the maps that were kept, with other thresholds; no model is needed.

    source: a finished folder of labels. out: another folder; its settings say where the labels
    came from. Rows that had no map keep their reason. Raises ValueError where `out` holds labels
    made otherwise: stopped half-way, two kinds would stand side by side.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is where the labels come from; relabel into another folder")
    settings = read_settings(source)
    shards, tokens = shard_paths(source), settings["image_tokens"]
    root = image_root(source).resolve()
    made = {"labels": asdict(config), "images": str(root), "relabelled_from": str(source.resolve())}
    out.mkdir(parents=True, exist_ok=True)
    remove_partial_files(out)
    guard_settings(out / SETTINGS_FILE, settings | made)
    for path in tqdm(shards, desc="Relabelling", unit="shard"):
        rows: Any = read_shard(path, tokens)
        write_shard([_judge_anew(row, config) for row in rows], out / path.name)


def _judge_anew(row: dict[str, Any], config: LabelConfig) -> dict[str, Any]:
    if not row["grounding"] or row["reason"] in NO_MAP:
        return row
    shape = row["rows"], row["columns"]
    grounding, sink = (np.array(row[n], np.float32).reshape(shape) for n in ("grounding", "sink"))
    padding = padding_of(row["size"], row["extent"], shape, config)
    labels, reason = label_cells(grounding, sink, config, padding)
    words = (row[name] for name in ("id", "image", "question", "response"))
    return label_row(
        *words,
        grounding=grounding,
        sink=sink,
        labels=labels,
        extent=tuple(row["extent"]),
        size=tuple(row["size"]),
        reason=reason,
    )


def report(out: Path) -> dict[str, Any]:
    """The summary of a finished folder, with the share of images that could not be used."""
    found = summarise(load_labels(out))
    bad = sum(n for reason, n in found["ignored"].items() if reason.startswith(BAD_IMAGE))
    return found | {"bad_image_share": round(bad / max(found["questions"], 1), 4)}


def preview(out: Path, count: int, seed: int = 0) -> Path:
    """Draw `count` kept samples: the image with its grounding map, question and response."""
    rows = load_labels(out)
    kept = [i for i, reason in enumerate(rows["reason"]) if reason is None]
    if not kept:
        raise ValueError(f"{out} holds no sample with a label, so there is nothing to draw")
    chosen = np.random.default_rng(seed).permutation(kept)[:count]
    cards = [_card(rows[int(i)], image_root(out)) for i in sorted(chosen)]
    return sheet(cards, out / "preview.png", columns=2)


def _card(row: dict[str, Any], root: Path) -> Card:
    image = load_image(safe_join(root, row["image"]))
    shape = row["rows"], row["columns"]
    grounding = np.array(row["grounding"], np.float32).reshape(shape)
    foreground = (np.array(row["labels"]) == FOREGROUND).reshape(shape).astype(float)
    return Card(
        image,
        row["question"],
        {"answer": row["response"]},
        [],
        # Labels of version 0.1 do not say where their grid lies.
        tuple(row["extent"]) or (0, 0, *image.size),
        foreground,
        note=f"left: {row['foreground']} foreground cells; right: the attention they are made of",
        second_map=grounding / max(grounding.max(), 1e-9),
    )
