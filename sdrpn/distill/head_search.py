"""Find the attention heads that point at what is asked, without annotation (docs/heads.md).

The model answers questions about synthetic pictures (probes.py), for which the correct region is
known. The attention of its answers (attention_probe.py) is scored against it (scores.py). Half of
the pictures select the heads, the other half evaluate the selection.
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
from sdrpn.distill.attention_probe import AttentionProbe, ProbeQuestion, stack_layers
from sdrpn.distill.probes import SIDE, draw_probes
from sdrpn.distill.scores import (
    METRICS,
    Sinks,
    Targets,
    choose_branch_layer,
    find_sinks,
    join_heads,
    rank_heads,
    score_maps,
)
from sdrpn.engine import ZoomModel
from sdrpn.inference.attention_rows import Rows
from sdrpn.io.atomic import read_object, write_json

CANDIDATES = 16
"""Number of the best single heads that are considered for the combination."""
CHOSEN = "chosen heads"
ELSEWHERE = "chosen heads, another disc's box"
"""The control: the score of maps that highlight any disc, whichever is asked for."""

Head = tuple[int, int]
"""(layer, head), both counted from 0."""


@dataclass(frozen=True)
class Findings:
    """Result of `find_heads`.

    Args:
        labels: Settings for this model's pseudo-labels.
        sinks: The layer and threshold of its attention sinks.
        joined: (head, IoU of the combination up to it) in the order of selection.
        branch_layer: B, the layer that the RPN should branch off from.
        branch_why: The reason for B, in one sentence.
        scores: {metric: [L, H]} of single heads on the selection pictures.
        held_out: {map and target: {metric: mean}} on the evaluation pictures.
        facts: Model, probes and examples of answers.
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
        """Whether the heads look at the disc that is asked about, not just at any disc."""
        return self.held_out[CHOSEN]["iou"] > 2 * self.held_out[ELSEWHERE]["iou"]

    def report(self) -> dict[str, Any]:
        """Return everything but the labels, as JSON values."""
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
    """Find the pointing heads of a model, its sinks, and the branch layer of its RPN.

    Args:
        zoom: Engine of the model; its proposer is not used.
        scenes: Number of probe pictures; there is a question about each disc.
        seed: Seed of the pictures.
        side: Side of the pictures, in pixels.
        batch_size: Questions per batch.
        max_new_tokens: Maximum length of an answer.
        max_heads: Maximum number of selected heads.
        depth: R of the RPN that will be trained.

    Raises:
        ValueError: If a setting is out of range, the model answers no question, or no head points.
    """
    if scenes < 4 or max_heads < 1:
        raise ValueError(f"scenes must be 4, max_heads 1 or more, got {scenes}, {max_heads}")
    layers = zoom.backbone.num_layers
    choose_branch_layer(0, layers, depth)  # raises before the work if the depth does not fit
    probe = AttentionProbe(zoom, batch_size)
    questions = probe.questions(draw_probes(seed, scenes, side))
    _check_token_budget(zoom.backbone, questions)
    asked = probe.answer(questions, max_new_tokens)
    choosing, held_out = ([a for a in asked if a.target.image % 2 == half] for half in (0, 1))
    if not choosing or not held_out:
        raise ValueError(
            f"{zoom.backbone.name} gave no answer to any probe question, or none that fits its "
            f"context of {zoom.backbone.context_length} tokens: check the model"
        )

    sinks = _sinks(probe, choosing)
    config = _without_heads(zoom.backbone, sinks, max_new_tokens)
    scores = _score_all(probe, choosing, config)
    joined = _join(probe, choosing, scores, config, max_heads)
    best, _ = joined[0][0]
    labels = _with_heads(config, [head for head, _ in joined], sinks)
    measured = _compare(probe, held_out, labels, best)
    facts = {
        "model": zoom.backbone.name,
        "sdrpn_version": __version__,
        "probes": {"seed": seed, "scenes": scenes, "side": side},
        "questions": {
            "choosing": len(choosing),
            "held_out": len(held_out),
            "unanswered": len(questions) - len(asked),
        },
        "answers": {one.question: probe.text(one) for one in asked[:5]},
    }
    branch, why = choose_branch_layer(best, layers, depth)
    return Findings(labels, sinks, joined, branch, why, scores, measured, facts)


def _check_token_budget(backbone: Backbone, asked: Sequence[ProbeQuestion]) -> None:
    """Raise ValueError unless every probe question leaves room for an answer."""
    budget = min(backbone.remaining_tokens(len(one.target.inside), one.token_ids) for one in asked)
    if budget < 1:
        tokens = backbone.context_length - budget
        raise ValueError(
            f"a probe question of {tokens} tokens leaves no room for an answer in "
            f"{backbone.name}'s context of {backbone.context_length}: max_position_embeddings in "
            "its config.json must be larger"
        )


def _sinks(probe: AttentionProbe, asked: Sequence[ProbeQuestion]) -> Sinks:
    layers = range(probe.backbone.num_layers)
    batches = probe.read_attention(asked, layers, "Looking for sinks")
    means = [row.mean(1) for _, rows in batches for row in stack_layers(rows, layers)]
    return find_sinks(means, [one.target for one in asked])


def _without_heads(backbone: Backbone, sinks: Sinks, max_new_tokens: int) -> LabelConfig:
    """The published thresholds with this model's sinks, before heads are selected."""
    return replace(
        backbone.label_rules,
        sink=(LayerHeads(sinks.layer or 0),),
        sink_threshold=sinks.threshold,
        max_new_tokens=max_new_tokens,
    )


def _with_heads(config: LabelConfig, heads: Sequence[Head], sinks: Sinks) -> LabelConfig:
    """Settings with the selected heads; ViCrop reads the layer of the best one, as published."""
    layers = sorted({layer for layer, _ in heads})
    grounding = [
        LayerHeads(layer, tuple(sorted(head for other, head in heads if other == layer)))
        for layer in layers
    ]
    best = heads[0][0]
    # Without sinks nothing is removed, so reading another layer would be wasted.
    sink = config.sink if sinks.layer is not None else (LayerHeads(best),)
    return replace(config, grounding=tuple(grounding), sink=sink, vicrop_layer=best)


def _score_all(
    probe: AttentionProbe, asked: Sequence[ProbeQuestion], config: LabelConfig
) -> dict[str, np.ndarray]:
    """Mean score of every single head: {metric: [L, H]}."""
    layers, found = range(probe.backbone.num_layers), []
    for some, rows in probe.read_attention(asked, layers, "Scoring heads"):
        maps, sinks = stack_layers(rows, layers), _arrays(rows.mean(config.sink))
        for one, own, sink in zip(some, maps, sinks, strict=True):
            found.append(score_maps(own.reshape(-1, own.shape[-1]), sink, one.target, config))
    means = np.mean(found, axis=0).reshape(len(layers), -1, len(METRICS))
    return {name: means[..., i] for i, name in enumerate(METRICS)}


def _join(
    probe: AttentionProbe,
    asked: Sequence[ProbeQuestion],
    scores: Mapping[str, np.ndarray],
    config: LabelConfig,
    max_heads: int,
) -> list[tuple[Head, float]]:
    """Select the heads that point best together: (head, IoU of the combination up to it)."""
    if not scores["iou"].max() > 0:
        raise ValueError(
            f"no attention head of {probe.backbone.name} points at what is asked: on "
            f"{len(asked)} probe questions no head's pseudo-labels overlap the true box"
        )
    candidates = rank_heads(scores["iou"], scores["mass"], CANDIDATES)
    layers = sorted({layer for layer, _ in candidates} | {one.layer for one in config.sink})
    maps, sinks = [], []
    for _, rows in probe.read_attention(asked, layers, "Joining heads"):
        by_head = zip(*(_heads_of(rows, layer, head) for layer, head in candidates), strict=True)
        maps += [np.stack(one) for one in by_head]
        sinks += _arrays(rows.mean(config.sink))
    targets = [one.target for one in asked]
    selected = join_heads(maps, sinks, targets, config, max_heads=max_heads)
    return [(candidates[index], value) for index, value in selected]


def _compare(
    probe: AttentionProbe, asked: Sequence[ProbeQuestion], labels: LabelConfig, layer: int
) -> dict[str, dict[str, float]]:
    """Mean scores of the selected heads, their layer's mean, the control, and published heads."""
    published = probe.backbone.published_labels()
    whole_layer = replace(labels, grounding=(LayerHeads(layer),))
    own = [one.target for one in asked]
    variants = {
        CHOSEN: (labels, own),
        f"all heads of layer {layer}": (whole_layer, own),
        ELSEWHERE: (labels, _neighbours(own)),
    }
    variants |= {"published heads": (published, own)} if published else {}
    layers = sorted({c.layer for one, _ in variants.values() for c in (*one.grounding, *one.sink)})
    maps: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in variants}
    for _, rows in probe.read_attention(asked, layers, "Held-out scenes"):
        for name, (one, _) in variants.items():
            batch = (_arrays(rows.mean(heads)) for heads in (one.grounding, one.sink))
            maps[name] += zip(*batch, strict=True)
    measured = {}
    for name, (one, targets) in variants.items():
        pairs = zip(maps[name], targets, strict=True)
        each = [score_maps(own[None], sink, target, one)[0] for (own, sink), target in pairs]
        means = np.round(np.mean(each, axis=0), 4).tolist()
        measured[name] = dict(zip(METRICS, means, strict=True))
    return measured


def _heads_of(rows: Rows, layer: int, head: int) -> list[np.ndarray]:
    """Attention of one head to the image: [T] for each row."""
    return _arrays([row[head] for row in rows.by_layer[layer]])


def _arrays(values: Sequence[Tensor]) -> list[np.ndarray]:
    return [one.cpu().numpy() for one in values]


def _neighbours(targets: Sequence[Targets]) -> list[Targets]:
    """For each question, the target of the next question about the same image."""
    of_image: dict[int, list[Targets]] = {}
    for target in targets:
        of_image.setdefault(target.image, []).append(target)
    return [one for some in of_image.values() for one in (*some[1:], some[0])]


# --- files -------------------------------------------------------------------------------------


def save_findings(findings: Findings, out: Path | str) -> Path:
    """Write heads.json (a `LabelConfig`), report.json and heads.png.

    Args:
        findings: Result of `find_heads`.
        out: Folder, created if it does not exist.

    Returns:
        The folder.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    heat_map(findings).savefig(out / "heads.png")
    write_json(out / "report.json", findings.report())
    write_json(out / "heads.json", asdict(findings.labels))
    return out


def load_label_config(path: Path | str) -> LabelConfig:
    """Read a heads.json, given the file or its folder.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON, has unknown or missing keys, or names no head.
    """
    path = Path(path)
    path = path / "heads.json" if path.is_dir() else path
    if not path.is_file():
        hint = "create one with `sdrpn heads --model MODEL --out DIR`"
        raise FileNotFoundError(f"there is no head list at {path}; {hint}")
    try:
        config = LabelConfig.from_dict(read_object(path))
    except ValueError as error:
        raise ValueError(f"{path} is no head list: {error}") from None
    layers = (*config.grounding, *config.sink)
    complete = config.grounding and config.sink
    if not complete or not all(one.heads is None or one.heads for one in layers):
        raise ValueError(f"{path} is no head list: it names no head to read")
    return config


def heat_map(findings: Findings) -> Figure:
    """Plot the scores of all heads (selected ones framed) and the held-out IoU."""
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
