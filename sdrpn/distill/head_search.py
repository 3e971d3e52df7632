"""Which heads point, for any backbone, without annotation (docs/heads.md).

The model answers questions about pictures drawn here (probes.py), so it is known where it should
look; the attention of its own answers (listening.py) is scored against that (scores.py). Half of
the pictures choose, the other half say how good the choice is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sdrpn import __version__
from sdrpn.backbones.base import Backbone
from sdrpn.config import LabelConfig, LayerHeads
from sdrpn.distill.attention_probe import Asked, Listener, stacked
from sdrpn.distill.probes import SIDE, draw_probes
from sdrpn.distill.scores import (
    MEASURES,
    Sinks,
    Targets,
    branch_layer,
    find_sinks,
    join_heads,
    ranked,
    score_maps,
)
from sdrpn.engine import ZoomModel
from sdrpn.inference.attention_rows import Rows
from sdrpn.io.atomic import read_object, write_json

CANDIDATES = 16
"""How many of the best single heads are tried together."""
CHOSEN = "chosen heads"
ELSEWHERE = "chosen heads, another disc's box"
"""The control: what a map gets that looks at discs, whichever was asked for."""

Head = tuple[int, int]
"""(layer, head), both counted from 0."""


@dataclass(frozen=True)
class Findings:
    """What `find_heads` found, and what it rests on.

    labels: makes this model's pseudo-labels. joined: its heads in the order of joining, each with
    the joint IoU from then on. branch_layer: B, where its RPN should branch off, and why.
    scores: {measure: [L, H]} of every head alone, on the pictures that chose. held_out: {whose map
    against what: {measure: mean}} on the others. facts: model, probes, answers.
    """

    labels: LabelConfig
    sinks: Sinks
    joined: Sequence[tuple[Head, float]]
    branch_layer: int
    branch_why: str
    scores: Mapping[str, np.ndarray]
    held_out: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any]

    @property
    def follows_question(self) -> bool:
        """Whether the heads look at what was asked, not merely at whatever is there."""
        return self.held_out[CHOSEN]["iou"] > 2 * self.held_out[ELSEWHERE]["iou"]

    def report(self) -> dict[str, Any]:
        """All of it but the labels, ready for JSON."""
        return {
            **self.facts,
            "joined": [
                {"layer": layer, "head": head, "iou": round(value, 4)}
                for (layer, head), value in self.joined
            ],
            "held_out": self.held_out,
            "follows_question": self.follows_question,
            "sinks": asdict(self.sinks),
            "branch_layer": self.branch_layer,
            "branch_why": self.branch_why,
            "scores": {name: np.round(values, 4).tolist() for name, values in self.scores.items()},
        }


def find_heads(
    zoom: ZoomModel,
    *,
    scenes: int = 60,
    seed: int = 0,
    side: int = SIDE,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    max_heads: int = 7,
    depth: int = 3,
) -> Findings:
    """Find the heads that point, the sinks, and the branch layer of an RPN of `depth`.

    scenes: pictures of `side` px; every disc is asked about. Raises ValueError where the model
    answers nothing, where no head points, and for settings out of range.
    """
    if scenes < 4 or max_heads < 1:
        raise ValueError(f"scenes must be 4, max_heads 1 or more, got {scenes}, {max_heads}")
    layers = zoom.backbone.num_layers
    branch_layer(0, layers, depth)  # a depth that does not fit is refused before the work
    listener = Listener(zoom, batch_size)
    questions = listener.questions(draw_probes(seed, scenes, side))
    _check_room(zoom.backbone, questions)
    asked = listener.answer(questions, max_new_tokens)
    choosing, held_out = ([a for a in asked if a.target.image % 2 == half] for half in (0, 1))
    if not choosing or not held_out:
        raise ValueError(
            f"{zoom.backbone.name} answered no probe question with a word, or with none that its "
            f"context of {zoom.backbone.context_length} tokens holds: check the model"
        )

    sinks = _sinks(listener, choosing)
    config = _without_heads(zoom.backbone, sinks, max_new_tokens)
    scores = _score_all(listener, choosing, config)
    joined = _join(listener, choosing, scores, config, max_heads)
    best, _ = joined[0][0]
    labels = _with_heads(config, [head for head, _ in joined], sinks)
    measured = _compare(listener, held_out, labels, best)
    facts = {
        "model": zoom.backbone.name,
        "sdrpn_version": __version__,
        "probes": {"seed": seed, "scenes": scenes, "side": side},
        "questions": {
            "choosing": len(choosing),
            "held_out": len(held_out),
            "unanswered": len(questions) - len(asked),
        },
        "answers": {one.question: listener.text(one) for one in asked[:5]},
    }
    branch, why = branch_layer(best, layers, depth)
    return Findings(labels, sinks, joined, branch, why, scores, measured, facts)


def _check_room(backbone: Backbone, asked: Sequence[Asked]) -> None:
    """Raise ValueError unless every probe question leaves room for an answer."""
    room = min(backbone.room(len(one.target.inside), one.words) for one in asked)
    if room < 1:
        tokens = backbone.context_length - room
        raise ValueError(
            f"a probe question of {tokens} tokens leaves no room for an answer in "
            f"{backbone.name}'s context of {backbone.context_length}: max_position_embeddings in "
            "its config.json must be larger"
        )


def _sinks(listener: Listener, asked: Sequence[Asked]) -> Sinks:
    layers = range(listener.backbone.num_layers)
    heard = listener.listen(asked, layers, "Looking for sinks")
    means = [row.mean(1) for _, rows in heard for row in stacked(rows, layers)]
    return find_sinks(means, [one.target for one in asked])


def _without_heads(backbone: Backbone, sinks: Sinks, max_new_tokens: int) -> LabelConfig:
    """The published thresholds with this model's sinks; the heads are not known yet."""
    return replace(
        backbone.label_rules,
        sink=(LayerHeads(sinks.layer or 0),),
        sink_threshold=sinks.threshold,
        max_new_tokens=max_new_tokens,
    )


def _with_heads(config: LabelConfig, heads: Sequence[Head], sinks: Sinks) -> LabelConfig:
    """The chosen heads; ViCrop, as published, reads the layer of the best."""
    layers = sorted({layer for layer, _ in heads})
    grounding = [
        LayerHeads(layer, tuple(sorted(head for other, head in heads if other == layer)))
        for layer in layers
    ]
    best = heads[0][0]
    # Without sinks nothing is removed; then no layer should have to run for their sake.
    sink = config.sink if sinks.layer is not None else (LayerHeads(best),)
    return replace(config, grounding=tuple(grounding), sink=sink, vicrop_layer=best)


def _score_all(
    listener: Listener, asked: Sequence[Asked], config: LabelConfig
) -> dict[str, np.ndarray]:
    """Mean score of every head alone: {measure: [L, H]}."""
    layers, found = range(listener.backbone.num_layers), []
    for some, rows in listener.listen(asked, layers, "Scoring heads"):
        maps, sinks = stacked(rows, layers), _arrays(rows.mean(config.sink))
        for one, own, sink in zip(some, maps, sinks, strict=True):
            found.append(score_maps(own.reshape(-1, own.shape[-1]), sink, one.target, config))
    means = np.mean(found, axis=0).reshape(len(layers), -1, len(MEASURES))
    return {name: means[..., i] for i, name in enumerate(MEASURES)}


def _join(
    listener: Listener,
    asked: Sequence[Asked],
    scores: Mapping[str, np.ndarray],
    config: LabelConfig,
    most: int,
) -> list[tuple[Head, float]]:
    """The heads that point best together, each with the joint IoU once it has joined."""
    if not scores["iou"].max() > 0:
        raise ValueError(
            f"no attention head of {listener.backbone.name} points at what is asked: on "
            f"{len(asked)} probe questions no head's pseudo-labels touch the true box"
        )
    candidates = ranked(scores["iou"], scores["mass"], CANDIDATES)
    layers = sorted({layer for layer, _ in candidates} | {one.layer for one in config.sink})
    maps, sinks = [], []
    for _, rows in listener.listen(asked, layers, "Joining heads"):
        by_head = zip(*(_heads_of(rows, layer, head) for layer, head in candidates), strict=True)
        maps += [np.stack(one) for one in by_head]
        sinks += _arrays(rows.mean(config.sink))
    targets = [one.target for one in asked]
    trail = join_heads(maps, sinks, targets, config, most=most)
    return [(candidates[index], value) for index, value in trail]


def _compare(
    listener: Listener, asked: Sequence[Asked], labels: LabelConfig, layer: int
) -> dict[str, dict[str, float]]:
    """Mean scores of the chosen heads, of their layer's average, and of the published list."""
    published = listener.backbone.published_labels()
    everything = replace(labels, grounding=(LayerHeads(layer),))
    own = [one.target for one in asked]
    rivals = {
        CHOSEN: (labels, own),
        f"all heads of layer {layer}": (everything, own),
        ELSEWHERE: (labels, _neighbours(own)),
    }
    rivals |= {"published heads": (published, own)} if published else {}
    layers = sorted({c.layer for one, _ in rivals.values() for c in (*one.grounding, *one.sink)})
    read: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in rivals}
    for _, rows in listener.listen(asked, layers, "Held-out scenes"):
        for name, (one, _) in rivals.items():
            batch = (_arrays(rows.mean(heads)) for heads in (one.grounding, one.sink))
            read[name] += zip(*batch, strict=True)
    measured = {}
    for name, (one, targets) in rivals.items():
        pairs = zip(read[name], targets, strict=True)
        each = [score_maps(own[None], sink, target, one)[0] for (own, sink), target in pairs]
        means = np.round(np.mean(each, axis=0), 4).tolist()
        measured[name] = dict(zip(MEASURES, means, strict=True))
    return measured


def _heads_of(rows: Rows, layer: int, head: int) -> list[np.ndarray]:
    """One head's attention to the image, [T] for each row."""
    return _arrays([row[head] for row in rows.by_layer[layer]])


def _arrays(values: Sequence[Tensor]) -> list[np.ndarray]:
    return [one.cpu().numpy() for one in values]


def _neighbours(targets: Sequence[Targets]) -> list[Targets]:
    """For each question the target of the next one about the same image."""
    of_image: dict[int, list[Targets]] = {}
    for target in targets:
        of_image.setdefault(target.image, []).append(target)
    return [one for some in of_image.values() for one in (*some[1:], some[0])]


# --- files -------------------------------------------------------------------------------------


def save_findings(findings: Findings, out: Path | str) -> Path:
    """Write heads.json (a LabelConfig), report.json and heads.png into a folder; returns it."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    heat_map(findings).savefig(out / "heads.png")
    write_json(out / "report.json", findings.report())
    write_json(out / "heads.json", asdict(findings.labels))
    return out


def load_label_config(path: Path | str) -> LabelConfig:
    """Read a heads.json, or that of the folder `sdrpn heads` wrote.

    Raises FileNotFoundError where there is none, and ValueError, naming the file, where it is not
    JSON, has unknown or missing keys, or names no head.
    """
    path = Path(path)
    path = path / "heads.json" if path.is_dir() else path
    if not path.is_file():
        hint = "make one with `sdrpn heads --model MODEL --out DIR`"
        raise FileNotFoundError(f"there is no head list at {path}; {hint}")
    try:
        config = LabelConfig.from_dict(read_object(path))
    except ValueError as error:
        raise ValueError(f"{path} is no head list: {error}") from None
    read = (*config.grounding, *config.sink)
    if not config.grounding or not config.sink or not all(o.heads is None or o.heads for o in read):
        raise ValueError(f"{path} is no head list: it names no head to read")
    return config


def heat_map(findings: Findings) -> Figure:
    """Every head's scores, layers down and heads across, the chosen ones framed; and the result."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained", dpi=110)
    *maps, bars = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    titles = {"iou": "IoU with the true box", "mass": "attention inside the object"}
    for axis, (name, title) in zip(maps, titles.items(), strict=True):
        image = axis.imshow(findings.scores[name], cmap="magma", vmin=0, aspect="auto")
        figure.colorbar(image, ax=axis, shrink=0.8)
        axis.set(title=title, xlabel="head", ylabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        for one in findings.labels.grounding:
            for head in one.heads or ():
                corner = (head - 0.5, one.layer - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#2fe05a", lw=2))
        axis.axhline(findings.branch_layer - 0.5, color="#2fc8e0", ls="--", lw=1)
    names = [textwrap.fill(name, 16) for name in findings.held_out]
    values = [scores["iou"] for scores in findings.held_out.values()]
    bars.bar_label(bars.barh(names, values, color="#c2185b", height=0.5), fmt="%.3f", padding=3)
    bars.invert_yaxis()
    bars.set(title="held-out scenes: IoU", xlim=(0, max(*values, 0.1) * 1.25))
    figure.suptitle(f"{findings.facts['model']}: dashed, the branch layer", fontsize=9)
    return figure
