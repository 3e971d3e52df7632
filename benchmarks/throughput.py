"""Measure questions per second of sdrpn and stock LLaVA-1.5 at equal batch size.

All systems share weights, images, questions and the number of new tokens, and are interleaved
within every repeat, so that a change in the machine's speed affects all of them.

    stock      transformers' generate() on the full prompt, left-padded for batches above 1.
               At batch size 1 the same as lmms-eval's llava_hf.
    none       sdrpn without zoom: the image is prefilled once for all its questions.
    two_pass   the published implementation: two passes over the full prompt (batch 1).
    sdrpn      sdrpn. Preset paper: 576 crop tokens; preset fast: as many as the region needs.
    vicrop     the ViCrop baseline over our prefix (batch 1, unless --vicrop-batched).

A table cell is a number of questions per image. Each repeat of a system starts with empty caches;
within the repeat, questions share their image. Region proposal runs for every question, but the box
is then given (--cells), so that every crop has the same size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.flops import FORMULAS, Load, Sizes
from benchmarks.measuring import Measured, jobs_of, measure, rows_of
from benchmarks.shapes import SHAPES
from benchmarks.stations import profile_question
from benchmarks.systems import all_systems, generation_of, middle_box, zooming_engine
from benchmarks.workload import (
    MIXES,
    Cell,
    Clock,
    achievable,
    describe_machine,
    describe_shape,
    load,
    questions,
    settings_of,
)
from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import published_labels
from sdrpn.io.atomic import atomic_write
from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from sdrpn.rpn.checkpoint import RPN

EXAMPLES = """examples:
  python -m benchmarks.throughput --quick --out quick.json      a first look, 2 cores, minutes
  python -m benchmarks.throughput --out docs/throughput.json    the table, 2 cores, about an hour
  python -m benchmarks.throughput --shape 7b --device cuda --out docs/throughput_7b.json
  python -m benchmarks.throughput --mix textvqa docvqa pope --out docs/throughput_mix.json
  python -m benchmarks.throughput --profile --quick             where one question's time goes

--out is rewritten after every cell, so an interrupted run keeps its finished cells.
ratio_to_stock is stock's seconds over the system's own: above 1 is faster than stock.
"""


@dataclass(frozen=True)
class Settings:
    """Settings of the run, saved in the JSON."""

    batch_sizes: tuple[int, ...]
    per_image: tuple[int, ...]
    mixes: tuple[str, ...]
    repeats: int
    new_tokens: int
    question_tokens: int
    image_size: tuple[int, int]
    cells: int
    systems: tuple[str, ...]
    vicrop_batched: bool

    def columns(self) -> list[Cell]:
        fixed = [Cell((count,)) for count in self.per_image]
        return fixed + [Cell(MIXES[name], name) for name in self.mixes]


def run(llava: Llava15, rpn: RPN, settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Measure every cell; returns the content of `out`."""
    box = middle_box(llava.grid, settings.cells)
    systems = all_systems(
        llava, rpn, box, settings.new_tokens, vicrop_batched=settings.vicrop_batched
    )
    jobs = jobs_of(systems, settings.systems, settings.batch_sizes)
    clock, sizes = Clock(llava.device), Sizes.of(llava, rpn.config)
    columns = settings.columns()
    result: dict[str, Any] = {
        "machine": describe_machine(llava.device),
        "shape": describe_shape(llava, rpn),
        "settings": settings_of(settings),
        "achievable_flops_per_second": 0.0,
        "rows": [],
    }
    finished: list[tuple[Cell, list[Measured]]] = []
    with tqdm(total=len(columns) * len(jobs) * (settings.repeats + 1), unit="run") as progress:
        for cell in columns:
            progress.set_description(f"{cell.mix or cell.mean} questions an image")
            counts = cell.enough(max(settings.batch_sizes))
            asked = questions(llava, counts, settings.question_tokens, settings.image_size)
            rate = max(result["achievable_flops_per_second"], achievable(llava))
            result["achievable_flops_per_second"] = rate
            finished.append((cell, measure(jobs, asked, clock, settings.repeats, progress)))
            result["rows"] = []
            for done, measured in finished:
                loads = _loads(llava, settings, done, len(llava.prompt_ids(asked[0].text).after))
                result["rows"] += rows_of(measured, done, sizes, loads, rate)
            _write(result, out)
    return result


def _loads(llava: Llava15, settings: Settings, cell: Cell, words: int) -> Callable[[float], Load]:
    """Return the Load for a number of crop tokens."""
    neutral = len(llava.prompt_ids(NEUTRAL_QUESTION).after)
    labels = published_labels(llava.num_layers, llava.text_config.hidden_size)
    layer = labels.vicrop_layer if labels else round(llava.num_layers * 14 / 32)
    return lambda crop: Load(cell.mean, words, round(crop), settings.new_tokens, neutral, layer)


def profile(llava: Llava15, rpn: RPN, settings: Settings, rate: float) -> dict[str, Any]:
    """Profile one question with both presets; prints and returns seconds by stage."""
    asked = questions(llava, [1], settings.question_tokens, settings.image_size)
    box, said = middle_box(llava.grid, settings.cells), generation_of(settings.new_tokens)
    sizes, found = Sizes.of(llava, rpn.config), {}
    for preset in ("paper", "fast"):
        print(f"\n## one question, preset {preset}\n")
        engine = zooming_engine(llava, rpn, box, preset)
        found[preset] = profile_question(engine, asked[0], said, sizes, rate, settings.repeats)
    return found


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    with atomic_write(out) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    gpu = torch.cuda.is_available()
    p.add_argument("--out", type=Path, help="JSON file to write")
    p.add_argument("--quick", action="store_true", help="batch 1, 1 and 4 questions, 3 repeats")
    p.add_argument("--profile", action="store_true", help="also profile one question")
    model = p.add_argument_group("model")
    model.add_argument("--shape", choices=sorted(SHAPES), default="small", help="random weights")
    model.add_argument("--layers", type=int, help="cut the shape to so many decoder layers")
    model.add_argument("--pretrained", help="folder or Hub id of real weights, instead of a shape")
    model.add_argument("--rpn", help="folder or Hub id of its RPN; default: an untrained one")
    model.add_argument("--device", default="cuda" if gpu else "cpu")
    model.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, else float16")
    model.add_argument("--attention", help="sdpa, eager, flash_attention_2, ...")
    work = p.add_argument_group("work")
    work.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    work.add_argument("--per-image", type=int, nargs="*", help="questions per image [1 2 4 16]")
    work.add_argument("--mix", nargs="+", choices=sorted(MIXES), default=[], help="by benchmark")
    work.add_argument("--systems", nargs="+", choices=sorted(FORMULAS), default=sorted(FORMULAS))
    work.add_argument("--vicrop-batched", action="store_true", help="vicrop at every batch size")
    work.add_argument("--repeats", type=int, help="timed rounds [5, with --quick 3]")
    work.add_argument("--new-tokens", type=int, default=4, help="new tokens per answer")
    work.add_argument(
        "--question-tokens", type=int, default=60, help="question tokens after the image"
    )
    work.add_argument("--image-size", type=int, nargs=2, default=[640, 480], help="pixels")
    work.add_argument("--cells", type=int, default=8, help="side of the region, cells of 24")
    return p


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings of a command line."""
    columns = args.per_image
    if columns is None:
        columns = [] if args.mix else [1, 4] if args.quick else [1, 2, 4, 16]
    return Settings(
        batch_sizes=(1,) if args.quick else tuple(sorted(set(args.batch_sizes))),
        per_image=tuple(columns),
        mixes=tuple(args.mix),
        repeats=args.repeats or (3 if args.quick else 5),
        new_tokens=args.new_tokens,
        question_tokens=args.question_tokens,
        image_size=tuple(args.image_size),
        cells=args.cells,
        systems=tuple(args.systems),
        vicrop_batched=args.vicrop_batched,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    args = parser().parse_args(arguments)
    settings = settings_from(args)
    llava, rpn = load(
        args.shape,
        layers=args.layers,
        pretrained=args.pretrained,
        rpn=args.rpn,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
    )
    result = run(llava, rpn, settings, args.out)
    for row in result["rows"]:
        name = " ".join(filter(None, (row["system"], row["preset"])))
        print(
            f"{name:<12} batch {row['batch_size']:<3} {row['questions_per_image']:<4} an image  "
            f"{row['seconds_per_question']:7.3f} s  {row['ratio_to_stock']:5.2f} of stock "
            f"({row['ratio_spread'][0]:.2f} to {row['ratio_spread'][1]:.2f})"
        )
    if args.profile:
        rate = result["achievable_flops_per_second"]
        result["profile"] = profile(llava, rpn, settings, rate)
        _write(result, args.out)


if __name__ == "__main__":
    main()
