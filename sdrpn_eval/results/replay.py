"""Repeats one document of a run with the same task, model and arguments; lists what changed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrpn.boxes import PixelBox
from sdrpn.draw import Card, sheet
from sdrpn.io.atomic import write_json
from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.command_line import parse_arguments
from sdrpn_eval.model import MODEL_CLASSES
from sdrpn_eval.provenance.model import Provenance, read_latest
from sdrpn_eval.record import RecordLine, read_records
from sdrpn_eval.results.comparability import changes
from sdrpn_eval.results.documents import TaskData, load_data
from sdrpn_eval.results.evaluate import evaluate_again
from sdrpn_eval.results.read import BadRun, as_text
from sdrpn_eval.results.records import by_documents
from sdrpn_eval.results.responses import Source, arguments_of
from sdrpn_eval.results.scores import Document

DEVICE = ("type", "name", "cuda", "platform")
"""Properties of the device that identify the hardware."""


@dataclass(frozen=True)
class Look:
    """An answer and the line of the record about it; None without a record."""

    answer: str
    line: RecordLine | None

    @property
    def regions(self) -> Sequence[PixelBox]:
        return self.line.regions if self.line else ()

    @property
    def reason(self) -> str:
        return (self.line.reason or "") if self.line else "left no record"


@dataclass(frozen=True)
class Replay:
    """A document asked again; `moved` has a sentence for each difference between then and now."""

    document: Document
    prompt: str
    target: str | None
    then: Look
    now: Look
    moved: list[str]
    scores: Mapping[str, Any]

    @property
    def same(self) -> bool:
        return self.then.answer == self.now.answer

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        task, doc_id = self.document
        looks = {
            name: {"answer": look.answer, "line": look.line and look.line.as_dict()}
            for name, look in (("then", self.then), ("now", self.now))
        }
        content = {"prompt": self.prompt, "target": self.target, **looks}
        content |= {"moved": self.moved, "scores": self.scores}
        write_json(path, {"task": task, "doc_id": doc_id, "same": self.same, **content})


def ask_again(
    source: Source, document: Document, model_args: str, manager: Any, out: Path
) -> Replay:
    """Asks one document of a run again and writes pictures and `replay.json`.

    `model_args`, in lmms-eval's syntax, replace recorded ones.

    Raises:
        BadRun: If the run is of another model or does not hold the document.
    """
    task, doc_id = document
    _refuse_unknown(source, document)
    overrides = parse_arguments(model_args)
    given = arguments_again(source, overrides)
    with tempfile.TemporaryDirectory() as folder:
        # An empty record, so that no earlier answer is reused.
        model = MODEL_CLASSES[source.config["model"]](**given | {"record": folder, "batch_size": 1})
        config = dict(source.config) | {"limit": 1, "offset": doc_id}
        results = evaluate_again(model, [task], config, manager, out, predict_only=True)
        lines, facts = read_records(folder), read_latest(Path(folder))
    sample = source.run.tasks[task].samples[doc_id] if source.run else None
    recorded = by_documents(source.lines).get(document)
    if recorded:
        then, said = Look(_said(recorded), recorded[0]), _said(lines)
    else:  # Only filtered responses can be compared.
        assert sample is not None  # without a record there is a run, or there was no source
        then = Look(sample.answer, None)
        said = as_text(results["samples"][task][0]["filtered_resps"])
    replay = Replay(
        document,
        lines[0].prompt,
        sample.target if sample else None,
        then,
        Look(said, lines[0]),
        _moved(source.facts, facts, then.line, lines[0], overrides),
        sample.values if sample else {},
    )
    data, _ = load_data([task], manager=manager)
    _draw(replay, data[task], model.engine.backbone.image_grid, out)
    replay.save(out / "replay.json")
    return replay


def _refuse_unknown(source: Source, document: Document) -> None:
    if source.config["model"] not in ARGUMENTS:
        raise BadRun(
            f"{source.place} is a run of {source.config['model']}; replay asks "
            f"{' or '.join(ARGUMENTS)} again"
        )
    task, doc_id = document
    held = {line.doc_id for line in source.lines if line.task == task}
    if source.run is not None:
        held |= set(source.run.tasks[task].samples) if task in source.run.tasks else set()
    if not held:
        tasks = source.run.tasks if source.run else source.names
        raise BadRun(f"{source.place} has no task {task}, only {', '.join(tasks)}")
    if doc_id not in held:
        raise BadRun(
            f"{source.place} has no document {doc_id} of {task}, only {min(held)} to {max(held)}"
        )


def arguments_again(source: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The run's arguments with overrides; a preset replaces all arguments that it sets."""
    if source.facts is not None:
        recorded = arguments_of(source.facts)
    else:
        recorded = parse_arguments(source.config.get("model_args"))
    presets = ARGUMENTS[source.config["model"]].presets
    replaced = presets.get(str(overrides.get("preset", "")), {})
    return {k: v for k, v in recorded.items() if k not in replaced} | dict(overrides)


def _said(lines: Sequence[RecordLine]) -> str:
    """The answer; of a multiple choice, the option with the smallest loss, as in lmms-eval."""
    if lines[0].is_loss:
        best = min(lines, key=lambda line: math.inf if line.loss is None else line.loss)
        return str(best.continuation).strip()
    return lines[0].answer


def _moved(
    then: Provenance | None,
    now: Provenance | None,
    line: RecordLine | None,
    line_now: RecordLine,
    overrides: Mapping[str, Any],
) -> list[str]:
    """Sentences about all recorded properties that differ."""
    found = []
    if then is None or now is None:
        found.append("the run left no facts: what else has moved is not known")
        found += [f"{name} is {value}, as asked for here" for name, value in overrides.items()]
    else:
        for what, pair in (
            ("weights", (then.weights, now.weights)),
            ("version of", (then.versions, now.versions)),
            ("argument", (arguments_of(then), arguments_of(now))),
            ("device's", tuple({k: f.device.get(k) for k in DEVICE} for f in (then, now))),
            ("code's", (then.source or {}, now.source or {})),
        ):
            found += [f"{what} {k}: {a} then, {b} now" for k, (a, b) in changes(*pair).items()]
    if line is not None:
        if line.prompt != line_now.prompt:
            found.append(f"another prompt: {line.prompt!r} then, {line_now.prompt!r} now")
        if line.image_files != line_now.image_files:
            found.append("another image, by its hash")
    return found


def _draw(replay: Replay, data: TaskData, grid_of: Any, out: Path) -> None:
    """Writes replay.png, with the regions then and now, and crop_1.png etc., the crops now."""
    _, doc_id = replay.document
    image = data.image(doc_id)
    if image is None:
        return
    answers = {"then": replay.then.answer, "now": replay.now.answer}
    if replay.target is not None:
        answers["right"] = replay.target
    cards = [
        Card(
            image,
            replay.prompt,
            answers,
            look.regions,
            grid_of(image).extent,
            look.line.roi_map,
            truth=data.box(doc_id),
            note=f"seen {name}. {look.reason}".strip(),
        )
        for name, look in (("then", replay.then), ("now", replay.now))
        if look.line is not None
    ]
    sheet(cards, out / "replay.png")
    for number, box in enumerate(replay.now.regions, start=1):
        image.convert("RGB").crop(box).save(out / f"crop_{number}.png")
