"""Gates of the tiny model: `python -m tools.tiny_vstar.gates --docs docs`.

Trains the learned gate by both rules with the public command, on scenes drawn for this alone, and
measures it on other scenes beside the confidence of the first answer. The answers that the
generator knows only measure, except for the row that shows what annotated labels would give.
Writes gates.json and gates.md.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from sdrpn import RPN, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.distill.gate import fit
from sdrpn.distill.gate_job import (
    ALWAYS_STANDS,
    LABELS_FILE,
    NO_CELL,
    STATE,
    as_state,
    labelled,
    rpn_states,
)
from sdrpn.distill.gate_labels import RULES, GateConfig
from sdrpn.io.atomic import as_json
from sdrpn_eval.demo import tiny_path
from sdrpn_eval.results.stats import clustered, rounded, with_interval
from tools.tiny_vstar import make_benchmark
from tools.tiny_vstar.score import BATCH, ask_all, is_right
from tools.tiny_vstar.train_rpn import run

LABEL_SEED, MEASURE_SEED = (20260, 61), (20260, 62)
"""Scenes to label and scenes to measure on; nothing else draws them."""
LABEL_SCENES, MEASURE_SCENES = 300, 150
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
RESAMPLES = 1000
Row = dict[str, Any]


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


def is_mended(stock: str, zoom: str, row: Mapping[str, Any]) -> bool:
    """Whether a zoom changes a wrong answer to the right one."""
    return is_right(zoom, row) and not is_right(stock, row)


def label_quality(lines: Sequence[Row], rows: Mapping[str, Row], rule: str) -> Row:
    """Count the labels of one rule, and how often they are the generator's answer."""
    found: list[tuple[int, bool]] = []
    for line in lines:
        for sample in labelled([line], GateConfig(rule))[0]:
            mended = is_mended(line["stock"], line["zoom"], rows[str(line["id"])])
            found.append((sample.label, mended))
    counts = [sum(label == one for label, _ in found) for one in (0, 1)]
    right = [label == mended for label, mended in found]
    return {
        "questions": len(lines),
        "labels 0": counts[0],
        "labels 1": counts[1],
        "ignored": len(lines) - len(found),
        "right": round(float(np.mean(right)), 4),
    }


def read_lines(folder: Path) -> list[Row]:
    """The lines that `sdrpn train-gate` left in a folder."""
    return [json.loads(line) for line in (folder / LABELS_FILE).read_text().splitlines()]


def annotated_gate(lines: Sequence[Row], rows: Mapping[str, Row]) -> Any:
    """The same probe, trained on the generator's answers: what better labels would give."""
    asked = [line for line in lines if line.get(STATE)]
    truth = [is_mended(line["stock"], line["zoom"], rows[str(line["id"])]) for line in asked]
    states = np.stack([as_state(line[STATE]) for line in asked])
    return fit(states, np.array(truth, int), [line["image"] for line in asked])


class Measured:
    """Fresh questions, answered with and without a zoom.

    Args:
        model: Folder of a tiny model with its RPN.
        scenes: Number of scenes.
    """

    def __init__(self, model: Path, scenes: int) -> None:
        self.rows = make_benchmark.benchmark_rows(scenes, MEASURE_SEED)
        self.images = [row["image_id"] for row in self.rows]
        self.backbone = Llava15.load(str(model), dtype="float32")
        zoom = ZoomModel(self.backbone, RPN.from_pretrained(str(model / "rpn")))
        self.questions = [
            Question(row["question"], (Image.open(io.BytesIO(row["image"]["bytes"])),))
            for row in self.rows
        ]
        never = replace(zoom.zoom, gate=ALWAYS_STANDS, threshold=NO_CELL)
        unzoomed = [replace(question, zoom=never) for question in self.questions]
        stock = ask_all(zoom, unzoomed, "stock")
        zoomed = ask_all(zoom, self.questions, "zoom")
        self.confidence = np.array([answer.confidence for answer in stock], float)
        self.states = np.concatenate(
            [rpn_states(zoom, self.questions[i : i + BATCH]) for i in self._starts()]
        )
        self.stock = self._right([answer.text for answer in stock])
        self.zoom = self._right([answer.text for answer in zoomed])

    def _starts(self) -> range:
        return range(0, len(self.questions), BATCH)

    def _right(self, texts: Sequence[str]) -> np.ndarray:
        pairs = zip(texts, self.rows, strict=True)
        return np.array([is_right(text, row) for text, row in pairs], float)

    def gate_of(self, folder: Path) -> np.ndarray:
        """The probabilities of a saved gate, as the engine gives them."""
        rpn = RPN.from_pretrained(str(folder))
        answers = ask_all(ZoomModel(self.backbone, rpn), self.questions, folder.name)
        return np.array([answer.gate for answer in answers], float)

    def measure(self, name: str, need: np.ndarray) -> Row:
        """AUC of a score of need, and accuracy over the share of questions that it skips."""
        mended = (self.zoom > self.stock).astype(int)
        order = np.argsort(need, kind="stable")
        accuracy = {}
        for share in SHARES:
            right = self.zoom.copy()
            skipped = order[: round(share * len(order))]
            right[skipped] = self.stock[skipped]
            accuracy[f"{share:g}"] = rounded(clustered(right.tolist(), self.images))
        row = {"name": name, "auc": self._auc(mended, need), "accuracy": accuracy}
        print(row, flush=True)
        return row

    def _auc(self, mended: np.ndarray, need: np.ndarray) -> list[float]:
        """[AUC, low, high] with a 95 % bootstrap interval over images."""
        rng = np.random.default_rng(0)
        names = sorted(set(self.images))
        places = {name: np.flatnonzero(np.array(self.images) == name) for name in names}
        drawn = []
        for _ in range(RESAMPLES):
            chosen = np.concatenate(
                [places[names[i]] for i in rng.integers(0, len(names), len(names))]
            )
            drawn.append(roc_auc_score(mended[chosen], need[chosen]))
        low, high = np.percentile(drawn, [2.5, 97.5])
        return [round(float(v), 3) for v in (roc_auc_score(mended, need), low, high)]

    def at_random(self) -> Row:
        """What skipping questions at random gives, in expectation."""
        zoom, stock = self.zoom.mean(), self.stock.mean()
        accuracy = {
            f"{s:g}": [round(float((1 - s) * zoom + s * stock), 4), None, None] for s in SHARES
        }
        return {"name": "at random, in expectation", "auc": [0.5, None, None], "accuracy": accuracy}


def measure(model: Path, work: Path, label_scenes: int, measure_scenes: int) -> Row:
    """Train both gates and measure all."""
    rows = write_questions(work, label_scenes)
    minutes = {rule: round(run(command(model, work, rule)) / 60, 1) for rule in RULES}
    lines = {rule: read_lines(work / rule) for rule in RULES}
    fresh = Measured(model, measure_scenes)
    annotated = annotated_gate(lines["consensus"], rows)
    gates = [fresh.measure(f"learned, `{rule}`", fresh.gate_of(work / rule)) for rule in RULES]
    gates += [
        fresh.measure("confidence of the first answer", -fresh.confidence),
        fresh.measure("learned, annotated labels", annotated.probability(fresh.states)),
        fresh.at_random(),
    ]
    reports = {rule: json.loads((work / rule / "config.json").read_text()) for rule in RULES}
    return {
        "label_scenes": label_scenes,
        "labels": {rule: label_quality(lines[rule], rows, rule) for rule in RULES},
        "held_out": {
            rule: {k: v for k, v in reports[rule]["facts"].items() if k.startswith("gate held-out")}
            for rule in RULES
        },
        "minutes": minutes,
        "measure_scenes": measure_scenes,
        "questions": len(fresh.rows),
        "stock": round(float(fresh.stock.mean()), 4),
        "zoom": round(float(fresh.zoom.mean()), 4),
        "mended": int((fresh.zoom > fresh.stock).sum()),
        "spoiled": int((fresh.zoom < fresh.stock).sum()),
        "gates": gates,
    }


def table(result: Mapping[str, Any]) -> str:
    """The table of all gates in percent, with 95 % intervals by image."""
    shares = " | ".join(f"{100 * share:.0f} %" for share in SHARES)
    lines = [f"| gate | AUC | {shares} |", "|---|---|" + "---|" * len(SHARES)]
    for gate in result["gates"]:
        cells = [with_interval(gate["auc"], 1, ".2f")]
        cells += [with_interval(gate["accuracy"][f"{s:g}"], 100, ".1f") for s in SHARES]
        lines.append(f"| {gate['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    (args.docs / "gates.json").write_text(as_json(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
