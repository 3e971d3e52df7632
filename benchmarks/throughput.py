"""Measure questions per second of sdrpn and the stock model at equal batch size.

All systems share weights, images, questions and the number of new tokens, and are interleaved
within every repeat, so that a change in the machine's speed affects all of them.

    stock      transformers' generate() on the full prompt, left-padded for batches above 1.
               At batch size 1 the same as lmms-eval's llava_hf.
    none       sdrpn without zoom: the image is prefilled once for all its questions.
    two_pass   the published implementation: two passes over the full prompt (batch 1).
    sdrpn      sdrpn. Preset paper: 576 crop tokens; preset fast: at most 64; preset fastest: the
               same, and the upper layers see 128 image tokens.
    gated      sdrpn, preset fast, which answers without a zoom first; that answer stands for a
               given share of the questions (0, 25, 50, 75 %).
    vicrop     the ViCrop baseline over our prefix (batch 1, unless --vicrop-batched).

With --family qwen2_5_vl, stock has 4096 tokens per image, and 1024 and 576 as presets; two_pass and
sdrpn have a first look and a crop of 576 tokens.

A table cell is a number of questions per image. Each repeat of a system starts with empty caches;
within the repeat, questions share their image. Region proposal runs for every question, but the box
is then given (--cells), so that every crop has the same size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.flops import FORMULAS, Sizes
from benchmarks.measuring import Measured, jobs_of, measure, rows_of
from benchmarks.setups import Setup, llava_setup, qwen_setup
from benchmarks.shapes import SHAPES
from benchmarks.shapes_qwen import QWEN_SHAPES, load_qwen
from benchmarks.stations import profile_batch
from benchmarks.systems import (
    GATED_PERCENT,
    PRESETS,
    generation_of,
    middle_box,
    zooming_engine,
)
from benchmarks.workload import (
    MIXES,
    Cell,
    Clock,
    achievable,
    describe_machine,
    load,
    questions,
    settings_of,
)
from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.loading import pick_dtype
from sdrpn.io.atomic import atomic_write
from sdrpn.rpn.checkpoint import RPN

EXAMPLES = """examples:
  python -m benchmarks.throughput --quick --out quick.json      a first look, 2 cores, 2 minutes
  python -m benchmarks.throughput --out docs/throughput.json    the table, 2 cores, about an hour
  python -m benchmarks.throughput --shape 7b --device cuda --out docs/throughput_7b.json
  python -m benchmarks.throughput --mix textvqa docvqa pope --out docs/throughput_mix.json
  python -m benchmarks.throughput --family qwen2_5_vl --quick   Qwen2.5-VL's proportions
  python -m benchmarks.throughput --profile --quick             where a question's time goes

--out is rewritten after every cell, so an interrupted run keeps its finished cells.
ratio_to_stock is stock's seconds over the system's own: above 1 is faster than stock.
"""

SHAPES_OF = {"llava": SHAPES, "qwen2_5_vl": QWEN_SHAPES}
IMAGE_SIZES = {"llava": (640, 480), "qwen2_5_vl": (1792, 1792)}
"""Default pixels of an image; Qwen2.5-VL's are 64 x 64 cells of 28."""

QUICK = ("sdrpn-fast", "sdrpn-fastest", "gated-50")
SYSTEMS = [
    *sorted(FORMULAS),
    *(f"sdrpn-{preset}" for preset in PRESETS),
    *(f"gated-{percent}" for percent in GATED_PERCENT),
]

LEAST_QUESTIONS = 4
"""So that every share of gated questions is a number of questions."""

MODEL_OPTIONS = ("layers", "pretrained", "rpn", "device", "attention")


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


def run(setup: Setup, settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Measure every cell; returns the content of `out`."""
    backbone = setup.backbone
    jobs = jobs_of(setup.systems, settings.systems, settings.batch_sizes)
    clock, columns = Clock(backbone.device), settings.columns()
    result: dict[str, Any] = {
        "machine": describe_machine(backbone.device),
        "shape": setup.shape,
        "settings": settings_of(settings),
        "achievable_flops_per_second": 0.0,
        "rows": [],
    }
    finished: list[tuple[Cell, list[Measured]]] = []
    with tqdm(total=len(columns) * len(jobs) * (settings.repeats + 1), unit="run") as progress:
        for cell in columns:
            progress.set_description(f"{cell.mix or cell.mean} questions an image")
            counts = cell.enough(max(LEAST_QUESTIONS, *settings.batch_sizes))
            asked = questions(backbone, counts, settings.question_tokens, settings.image_size)
            rate = max(result["achievable_flops_per_second"], achievable(backbone))
            result["achievable_flops_per_second"] = rate
            finished.append((cell, measure(jobs, asked, clock, settings.repeats, progress)))
            result["rows"] = []
            for done, measured in finished:
                words = len(backbone.prompt_ids(asked[0].text).after)
                work = partial(setup.work, done.mean, words)
                result["rows"] += rows_of(measured, done, work, rate)
            _write(result, out)
    return result


def profile(llava: Llava15, rpn: RPN, settings: Settings, rate: float) -> dict[str, Any]:
    """Profile each preset and batch size; prints and returns seconds by stage of a question."""
    box, said = middle_box(llava.grid, settings.cells), generation_of(settings.new_tokens)
    sizes, found = Sizes.of(llava, rpn.config), {}
    for size in settings.batch_sizes:
        asked = questions(llava, [1] * size, settings.question_tokens, settings.image_size)
        for preset in PRESETS:
            name = preset if size == 1 else f"{preset}, batch size {size}"
            print(f"\n## preset {name}\n")
            engine = zooming_engine(llava, rpn, box, preset)
            found[name] = profile_batch(engine, asked, said, sizes, rate, settings.repeats)
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
    p.add_argument(
        "--quick",
        action="store_true",
        help=f"batch 1, 1 and 4 questions, 5 repeats, stock and {', '.join(QUICK)}",
    )
    p.add_argument("--profile", action="store_true", help="also profile one question per image")
    model = p.add_argument_group("model")
    model.add_argument("--family", choices=sorted(SHAPES_OF), default="llava")
    model.add_argument("--shape", default="small", help="random weights: small, 7b, ...")
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
    work.add_argument("--systems", nargs="+", choices=SYSTEMS, help="or one preset of them [all]")
    work.add_argument("--vicrop-batched", action="store_true", help="vicrop at every batch size")
    work.add_argument("--repeats", type=int, default=5, help="timed rounds")
    work.add_argument("--new-tokens", type=int, default=4, help="new tokens per answer")
    work.add_argument(
        "--question-tokens", type=int, default=60, help="question tokens after the image"
    )
    work.add_argument(
        "--image-size", type=int, nargs=2, help="pixels [640 480; Qwen2.5-VL: 1792 1792]"
    )
    work.add_argument("--cells", type=int, default=8, help="side of the region, cells of 24")
    return p


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings of a command line."""
    columns = args.per_image
    if columns is None:
        columns = [] if args.mix else [1, 4] if args.quick else [1, 2, 4, 16]
    width, height = args.image_size or IMAGE_SIZES[args.family]
    quick = args.quick and args.family == "llava"
    systems = args.systems or (QUICK if quick else sorted(FORMULAS))
    return Settings(
        batch_sizes=(1,) if args.quick else tuple(sorted(set(args.batch_sizes))),
        per_image=tuple(columns),
        mixes=tuple(args.mix),
        repeats=args.repeats,
        new_tokens=args.new_tokens,
        question_tokens=args.question_tokens,
        image_size=(width, height),
        cells=args.cells,
        systems=tuple(systems),
        vicrop_batched=args.vicrop_batched,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    args = parser().parse_args(arguments)
    if args.shape not in SHAPES_OF[args.family]:
        known = ", ".join(sorted(SHAPES_OF[args.family]))
        raise SystemExit(f"--shape of {args.family} must be one of {known}, got {args.shape}")
    if args.profile and args.family != "llava":
        raise SystemExit("--profile is for --family llava only; leave it out")
    settings = settings_from(args)
    model = {name: getattr(args, name) for name in MODEL_OPTIONS}
    if args.family == "llava":
        llava, rpn = load(args.shape, dtype=args.dtype, **model)
        setup = llava_setup(
            llava,
            rpn,
            cells=settings.cells,
            new_tokens=settings.new_tokens,
            vicrop_batched=settings.vicrop_batched,
        )
    else:
        dtype = pick_dtype(args.dtype, torch.device(args.device), torch.bfloat16)
        qwen, rpn = load_qwen(args.shape, dtype=dtype, **model)
        setup = qwen_setup(
            qwen,
            rpn,
            cells=settings.cells,
            new_tokens=settings.new_tokens,
            image_size=settings.image_size,
        )
    result = run(setup, settings, args.out)
    for row in result["rows"]:
        name = " ".join(filter(None, (row["system"], row["preset"])))
        print(
            f"{name:<12} batch {row['batch_size']:<3} {row['questions_per_image']:<4} an image  "
            f"{row['seconds_per_question']:7.3f} s  {row['ratio_to_stock']:5.2f} of stock "
            f"({row['ratio_spread'][0]:.2f} to {row['ratio_spread'][1]:.2f})"
        )
    if args.profile:
        assert isinstance(setup.backbone, Llava15)
        rate = result["achievable_flops_per_second"]
        result["profile"] = profile(setup.backbone, rpn, settings, rate)
        _write(result, args.out)


if __name__ == "__main__":
    main()
