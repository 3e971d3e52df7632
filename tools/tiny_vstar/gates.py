"""Gates of the tiny model: `python -m tools.tiny_vstar.gates --docs docs`.

Trains the learned gate by both rules with the public command, on scenes drawn for this alone, and
measures it on other scenes, beside the confidence of the first answer. The answers that the
generator knows measure, and train the probes that show what better labels would give. Writes
gates.json and gates.md.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from sdrpn import RPN, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.distill.gate import fit
from sdrpn.distill.gate_job import (
    LABELS_FILE,
    STATE,
    as_state,
    labelled,
    rpn_states,
    without_zoom,
)
from sdrpn.distill.gate_labels import RULES, GateConfig
from sdrpn.inference.upper import run_lower
from sdrpn.io.atomic import as_json, write_json
from sdrpn_eval.demo import tiny_path
from sdrpn_eval.results.stats import clustered, rounded
from tools.tiny_vstar import make_benchmark
from tools.tiny_vstar.gates_page import SHARES, page, table
from tools.tiny_vstar.score import BATCH, ask_all, is_right
from tools.tiny_vstar.train_rpn import run

LABEL_SEED, MEASURE_SEED = (20260, 61), (20260, 62)
"""Scenes to label and scenes to measure on; nothing else draws them."""
LABEL_SCENES, MEASURE_SCENES = 600, 150
FEWER = (250, 500, 1000)
"""Numbers of labels, besides all of them."""
RESAMPLES = 1000
Row = dict[str, Any]


# --- training ------------------------------------------------------------------------------------


def write_questions(folder: Path, scenes: int) -> dict[str, Row]:
    """Write questions.jsonl, without answers, and images; returns the rows by id."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = make_benchmark.benchmark_rows(scenes, LABEL_SEED)
    lines = []
    for row in rows:
        (folder / "images" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        entry = {"id": row["question_id"], "image": row["image"]["path"]}
        lines.append(as_json(entry | {"question": row["question"]}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return {row["question_id"]: row for row in rows}


def command(model: Path, work: Path, rule: str) -> list[str]:
    """The command that trains a gate by one rule into work/RULE."""
    return shlex.split(
        f"sdrpn train-gate {work}/questions.jsonl --images {work}/images --out {work}/{rule}"
        f" --model {model} --rpn {model}/rpn --rule {rule} --batch-size {BATCH}"
        " --max-new-tokens 8 --dtype float32"
    )


@dataclass(frozen=True)
class Labels:
    """The lines that `sdrpn train-gate` left, with the generator's rows by question."""

    lines: Sequence[Row]
    rows: Mapping[str, Row]
    rule: str

    @classmethod
    def read(cls, folder: Path, rows: Mapping[str, Row], rule: str) -> Labels:
        """Read the lines of a folder."""
        text = (folder / LABELS_FILE).read_text()
        return cls([json.loads(line) for line in text.splitlines()], rows, rule)

    def is_mended(self, line: Row) -> bool:
        """Whether the zoom changed a wrong answer to the right one."""
        row = self.rows[str(line["id"])]
        return is_right(line["zoom"], row) and not is_right(line["stock"], row)

    def quality(self) -> Row:
        """Count the labels, and how often they say whether the zoom mends the answer."""
        found = [
            (sample.label, self.is_mended(line))
            for line in self.lines
            for sample in labelled([line], GateConfig(self.rule))[0]
        ]
        ones = sum(label for label, _ in found)
        return {
            "questions": len(self.lines),
            "labels 1": ones,
            "labels 0": len(found) - ones,
            "ignored": len(self.lines) - len(found),
            "right": round(float(np.mean([label == mended for label, mended in found])), 4),
        }

    @cached_property
    def asked(self) -> list[Row]:
        """Lines of questions with a region."""
        return [line for line in self.lines if line.get(STATE)]

    def annotated_probe(self, states: np.ndarray) -> Any:
        """The probe on states [n, C] of `asked`, trained on the generator's answers."""
        truth = np.array([self.is_mended(line) for line in self.asked], int)
        return fit(states, truth, [line["image"] for line in self.asked])

    def probe(self, number: int) -> Any:
        """The probe on the first labels."""
        samples, _ = labelled(self.lines, GateConfig(self.rule))
        some = samples[:number]
        states, labels = np.stack([s.state for s in some]), np.array([s.label for s in some])
        return fit(states, labels, [s.image for s in some])


# --- measuring -----------------------------------------------------------------------------------


def last_layer_states(
    zoom: ZoomModel, questions: Sequence[Question], begun: Sequence[str] = ()
) -> np.ndarray:
    """[n, C] states of the last tokens behind the backbone's last layer.

    Args:
        zoom: The engine.
        questions: Questions with one image each.
        begun: Words of each answer that the model has said already.
    """
    backbone = zoom.backbone
    prefixes = zoom.prefill([question.images[0] for question in questions])
    ids = [backbone.prompt_ids(question.text).after for question in questions]
    if begun:
        said = backbone.tokenizer(list(begun), add_special_tokens=False).input_ids
        ids = [(*prompt, *words) for prompt, words in zip(ids, said, strict=True)]
    segments = [
        backbone.suffix_segment(prefix.next_position, own)
        for prefix, own in zip(prefixes, ids, strict=True)
    ]
    found = run_lower(backbone, prefixes, segments, backbone.num_layers)
    return np.stack([one.segment.embeds[-1].numpy() for one in found])


def in_batches(states: Callable[..., np.ndarray], zoom: ZoomModel, *columns: Any) -> np.ndarray:
    """[n, C] states of many questions; every column has an entry for each of them."""
    starts = range(0, len(columns[0]), BATCH)
    return np.concatenate([states(zoom, *(c[s : s + BATCH] for c in columns)) for s in starts])


def accuracy_when_skipping(
    zoom: np.ndarray, stock: np.ndarray, need: np.ndarray, share: float
) -> np.ndarray:
    """[n] of 0 and 1: right answers if the questions that need a zoom least do not get one.

    Args:
        zoom: [n], whether the zoomed answer is right.
        stock: [n], whether the answer without a zoom is right.
        need: [n], a score that is high where a zoom is needed.
        share: Share of questions without a zoom.
    """
    right = zoom.copy()
    skipped = np.argsort(need, kind="stable")[: round(share * len(need))]
    right[skipped] = stock[skipped]
    return right


class Fresh:
    """Fresh questions, answered with and without a zoom.

    Args:
        model: Folder of a tiny model with its RPN.
        scenes: Number of scenes.
    """

    def __init__(self, model: Path, scenes: int) -> None:
        self.rows = make_benchmark.benchmark_rows(scenes, MEASURE_SEED)
        self.images = [row["image_id"] for row in self.rows]
        backbone = Llava15.load(str(model), dtype="float32")
        self.engine = ZoomModel(backbone, RPN.from_pretrained(str(model / "rpn")))
        self.questions = [
            Question(row["question"], (Image.open(io.BytesIO(row["image"]["bytes"])),))
            for row in self.rows
        ]
        never = without_zoom(self.engine.zoom)
        unzoomed = [replace(question, zoom=never) for question in self.questions]
        stock = ask_all(self.engine, unzoomed, "stock")
        zoomed = ask_all(self.engine, self.questions, "zoom")
        self.confidence = np.array([answer.confidence for answer in stock], float)
        self.begun = [_first_word(answer.text) for answer in stock]
        self.stock = self._right([answer.text for answer in stock])
        self.zoom = self._right([answer.text for answer in zoomed])
        self.mended = (self.zoom > self.stock).astype(int)
        self.states = in_batches(rpn_states, self.engine, self.questions)

    def _right(self, texts: Sequence[str]) -> np.ndarray:
        pairs = zip(texts, self.rows, strict=True)
        return np.array([is_right(text, row) for text, row in pairs], float)

    def gate_of(self, folder: Path) -> np.ndarray:
        """The probabilities of a saved gate, as the engine gives them."""
        engine = ZoomModel(self.engine.backbone, RPN.from_pretrained(str(folder)))
        return np.array([a.gate for a in ask_all(engine, self.questions, folder.name)], float)

    def measure(self, name: str, need: np.ndarray) -> Row:
        """AUC of a score of need, and accuracy over the share of questions that it skips."""
        accuracy = {}
        for share in SHARES:
            right = accuracy_when_skipping(self.zoom, self.stock, need, share)
            accuracy[f"{share:g}"] = rounded(clustered(right.tolist(), self.images))
        return {"name": name, "auc": self.auc(need), "accuracy": accuracy}

    def auc(self, need: np.ndarray) -> list[float]:
        """[AUC, low, high] of a score, with a 95 % bootstrap interval over images."""
        rng = np.random.default_rng(0)
        names = np.array(self.images)
        places = [np.flatnonzero(names == name) for name in sorted(set(self.images))]
        drawn = []
        for _ in range(RESAMPLES):
            chosen = np.concatenate([places[i] for i in rng.integers(0, len(places), len(places))])
            drawn.append(roc_auc_score(self.mended[chosen], need[chosen]))
        low, high = np.percentile(drawn, [2.5, 97.5])
        return [round(float(v), 3) for v in (roc_auc_score(self.mended, need), low, high)]

    def at_random(self) -> Row:
        """What skipping questions at random gives, in expectation."""
        zoom, stock = self.zoom.mean(), self.stock.mean()
        accuracy = {f"{s:g}": [round(float((1 - s) * zoom + s * stock), 4)] for s in SHARES}
        return {"name": "at random, in expectation", "auc": [0.5], "accuracy": accuracy}


def _first_word(answer: str) -> str:
    return answer.partition(" ")[0]


def annotated_gates(fresh: Fresh, labels: Labels, images: Path) -> list[Row]:
    """Probes on several states, trained on the generator's answers: where the limit is."""
    engine, asked = fresh.engine, labels.asked
    questions = [
        Question(line["question"], (Image.open(images / line["image"]),)) for line in asked
    ]
    begun = [_first_word(line["stock"]) for line in asked]
    rpn = np.stack([as_state(line[STATE]) for line in asked]), fresh.states
    last, later = (
        tuple(in_batches(last_layer_states, engine, *columns) for columns in both)
        for both in (
            ((questions,), (fresh.questions,)),
            ((questions, begun), (fresh.questions, fresh.begun)),
        )
    )
    names = ("", ", last layer", ", last layer, a token later")
    return [
        fresh.measure(
            f"learned, annotated labels{name}", labels.annotated_probe(own).probability(measured)
        )
        for name, (own, measured) in zip(names, (rpn, last, later), strict=True)
    ]


def measure(model: Path, work: Path, label_scenes: int, measure_scenes: int) -> Row:
    """Train both gates and measure all."""
    rows = write_questions(work, label_scenes)
    for rule in RULES:
        run(command(model, work, rule))
    labels = {rule: Labels.read(work / rule, rows, rule) for rule in RULES}
    fresh, best = Fresh(model, measure_scenes), labels["consensus"]
    gates = [
        fresh.measure("confidence of the first answer", -fresh.confidence),
        *(fresh.measure(f"learned, `{rule}`", fresh.gate_of(work / rule)) for rule in RULES),
        *annotated_gates(fresh, best, work / "images"),
        fresh.at_random(),
    ]
    return {
        "label_scenes": label_scenes,
        "labels": {rule: labels[rule].quality() for rule in RULES},
        "measure_scenes": measure_scenes,
        "questions": len(fresh.rows),
        "stock": round(float(fresh.stock.mean()), 4),
        "zoom": round(float(fresh.zoom.mean()), 4),
        "mended": int(fresh.mended.sum()),
        "spoiled": int((fresh.zoom < fresh.stock).sum()),
        "gates": gates,
        "fewer": {str(n): fresh.auc(best.probe(n).probability(fresh.states)) for n in FEWER},
    }


def main() -> None:
    """Read the command line, train, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a tiny model; default: the shipped")
    parser.add_argument("--work", type=Path, default=Path("out/gates"), help="labels and RPNs")
    parser.add_argument("--scenes", type=int, default=LABEL_SCENES, help="scenes to label")
    parser.add_argument("--measure", type=int, default=MEASURE_SCENES, help="scenes to measure on")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write to")
    args = parser.parse_args()
    result = measure(args.model or tiny_path(), args.work, args.scenes, args.measure)
    args.docs.mkdir(parents=True, exist_ok=True)
    write_json(args.docs / "gates.json", result)
    (args.docs / "gates.md").write_text(page(result))
    print(table(result))


if __name__ == "__main__":
    main()
