"""`sdrpn train-gate`: train a gate that skips zooms which would not change the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn import model_registry
from sdrpn.cli.shared import (
    DtypeOption,
    ModelOption,
    PaddingOption,
    RpnRevisionOption,
    check_images,
    load_zoom,
    report_errors,
    say,
    weights_hint,
)
from sdrpn.io.plurals import counted

if TYPE_CHECKING:
    from sdrpn.distill.gate import Report
    from sdrpn.rpn.checkpoint import RPN


def train_gate(
    questions: Annotated[
        Path,
        typer.Argument(
            help="Questions without answers, as `sdrpn answer` reads them; some should be about "
            "small details, some not. 1,000 are a start."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image paths start from.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the RPN with its gate; resumes if it was begun.")
    ],
    model: ModelOption = model_registry.LLAVA_7B,
    rpn: Annotated[
        str | None,
        typer.Option(
            help="RPN to add the gate to: a folder or Hub id, which is not changed; default: the "
            "published one of MODEL. `tiny` includes its own."
        ),
    ] = None,
    rpn_revision: RpnRevisionOption = None,
    rule: Annotated[
        str,
        typer.Option(
            help="`consensus`: a zoom helps if two zooms agree with each other and not with the "
            "first look, and other crops of the image do not give the same answer. `agreement`: if "
            "it changes the answer; half of the cost, and changes for the worse count too."
        ),
    ] = "consensus",
    thresholds: Annotated[
        str,
        typer.Option(
            help="Thresholds of the zoom and of the second zoom of `consensus`, such as "
            "0.15,0.075; default: the RPN's own, and half of it."
        ),
    ] = "",
    kappa: Annotated[
        float,
        typer.Option(
            help="`consensus`: the zoom must raise the log-odds of its answer by more than this "
            "times what crops elsewhere do."
        ),
    ] = 1.0,
    held_out: Annotated[
        float, typer.Option(help="Share of the images held out for the curve.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the held-out images.")] = 0,
    learned_gate: Annotated[
        float | None,
        typer.Option(
            help="Threshold to save in the RPN's zoom settings, from the curve of an earlier run; "
            "default: none, and the gate is computed but skips nothing."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Questions per batch; halved if they do not fit.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
) -> None:
    """Train a gate for the RPN: which questions need the zoom? Labels without annotation.

    The frozen model answers every question with and without the zoom; a rule turns its answers
    into labels: 1, the zoom is needed, or 0. A linear probe on the RPN's state, hidden size + 1
    weights, learns them. At inference it costs nothing, and each skipped zoom saves the crop.

    Example: sdrpn train-gate questions.jsonl --images photos/ --out rpn-gated/

    Prints a curve: share of skipped zooms, the threshold that skips them, and how many answers
    stay. Choose a threshold from it and start the same command again with --learned-gate, which
    saves it in the RPN, or set learned_gate in the zoom settings. If interrupted, the same command
    resumes; the answers are in OUT/gate_labels.jsonl.
    """
    with report_errors():
        check_images(images)
        # Imported here, so that --help and a wrong path answer at once.
        from sdrpn.batch_inference import check_options
        from sdrpn.config import ZoomConfig
        from sdrpn.distill.gate import check_held_out
        from sdrpn.distill.gate_labels import GateConfig
        from sdrpn.io.questions import read_questions

        config = GateConfig.from_text(rule, thresholds, kappa)
        check_options(batch_size, max_new_tokens, "empty")
        check_held_out(held_out)
        ZoomConfig(learned_gate=learned_gate)
        asked = read_questions(questions, images)
        rpn_folder = find_rpn(model, rpn, out)
        check_out(out)
    with report_errors(weights_hint(model)):
        from sdrpn.distill.gate import train_gate as fit
        from sdrpn.distill.gate_job import GateJob, labelled
        from sdrpn.rpn.checkpoint import RPN

        zoom = load_zoom(model, rpn, "rpn", None, None, dtype, padding, rpn_revision)
    with report_errors():
        job = GateJob(
            zoom,
            asked,
            images,
            out,
            config,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        samples, ignored = labelled(job.run().values(), config)
        say(f"{len(samples)} of {counted(len(asked), 'question')} have a label")
        for reason, count in ignored.most_common():
            say(f"  ignored, {reason}: {count}")
        report = fit(samples, ignored, held_out=held_out, seed=seed)
        # Loaded again: the engine's has the base model's number type.
        bare = RPN.from_pretrained(rpn_folder, revision=rpn_revision)
        gated = with_report(bare, report, learned_gate)
        gated.facts |= {
            "gate questions": str(questions),
            "gate rule": rule,
            "gate thresholds": list(config.thresholds_for(zoom.zoom)),
            **({"gate kappa": kappa} if rule == "consensus" else {}),
            "gate seed": seed,
            "gate ignored": dict(ignored),
        }
        gated.save_pretrained(out)
    say("\n".join(summary(report)))
    say(f"RPN with a gate: {out}")


def find_rpn(model: str, rpn: str | None, out: Path) -> str:
    """Return the folder or Hub id of the RPN.

    Raises:
        ValueError: If there is none, or `out` is its folder.
    """
    _, found = model_registry.resolve(model, rpn or model_registry.PUBLISHED_RPN.get(model))
    if found is None:
        raise ValueError(
            f"the gate needs an RPN, and none is known for {model}: give one with --rpn, or train "
            "one with `sdrpn train`"
        )
    if Path(found).is_dir() and Path(found).resolve() == out.resolve():
        raise ValueError(f"{out} is the RPN's own folder, which is not changed; use another --out")
    return found


def check_out(out: Path) -> None:
    """Raise ValueError if a folder holds an RPN that `sdrpn train-gate` did not write."""
    # Imported here, so that --help answers at once.
    from sdrpn.distill.gate_job import LABELS_FILE
    from sdrpn.rpn.checkpoint import CONFIG_FILE

    if (out / CONFIG_FILE).exists() and not (out / LABELS_FILE).exists():
        raise ValueError(
            f"{out} holds a model that was not begun by `sdrpn train-gate` (there is no "
            f"{LABELS_FILE}); use another --out"
        )


def with_report(rpn: RPN, report: Report, learned_gate: float | None) -> RPN:
    """Return an RPN with the trained gate, its facts and threshold; earlier ones are dropped."""
    import torch

    gated = rpn.with_gate(torch.from_numpy(report.probe.weight), report.probe.bias)
    gated.config = replace(gated.config, zoom=replace(gated.config.zoom, learned_gate=learned_gate))
    earlier = {name: v for name, v in rpn.facts.items() if not name.startswith("gate ")}
    gated.facts = earlier | report.facts()
    return gated


def summary(report: Report) -> list[str]:
    """Return lines with the held-out measures and the curve."""
    zeros, ones = report.held_out
    lines = [
        f"trained on {report.trained[1]} labels 1 (zoom) and {report.trained[0]} labels 0; "
        f"held out: {ones} and {zeros}",
        f"held-out AUC: {report.auc:.3f}; of the first answer's confidence, which needs no "
        f"training (gate=): {report.confidence_auc:.3f}",
        "held-out questions, skipped by learned_gate=threshold:",
        "  skipped   threshold   agreement with the labels",
    ]
    return lines + [
        f"  {point['skipped']:7.0%}   {point['threshold']:9.4f}   {point['agreement']:.1%}"
        for point in report.curve
    ]
