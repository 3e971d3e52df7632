"""Sizes of LLaVA-1.5 7B and 13B, and one full-size run on a CPU.

Without --run, both shapes are built on the meta device, which stores no weights, and an image is
prefilled there with the normal code, so that the sizes are the real ones.

--run FOLDER writes random bfloat16 weights of --shape to it as sharded safetensors, one layer at a
time, with an RPN in FOLDER/rpn. A second process loads them through the lmms-eval plugin and asks
two questions about one image. The RPN runs, but the box is given, so that both questions are
zoomed. The memory of every stage is recorded. 7B needs 16 GB of disk and 24 GB of memory. Existing
weights are reused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.memory import Stages, stage_table
from benchmarks.random_checkpoint import build, meta_llava, meta_rpn
from benchmarks.shapes import SHAPES, images
from benchmarks.systems import force_region, generation_of, middle_box, preset_zoom
from benchmarks.workload import describe_machine, questions
from sdrpn.backbones.base import AttentionInputs, ImageInput
from sdrpn.engine import Question
from sdrpn.inference.prefix import prefill

EXAMPLES = """examples:
  python -m benchmarks.true_size --out docs/true_size.json
  python -m benchmarks.true_size --out docs/true_size.json --run /big/disk/random7b
  python -m benchmarks.true_size --shape small --layers 4 --run out/small     a quick run, seconds
"""

HEAD_TOKENS = 35
"""Tokens before the image with the LLaMA tokenizer, which random shapes do not have."""

DTYPE = torch.bfloat16


def sizes_of(name: str) -> dict[str, Any]:
    """Return parameters and bfloat16 bytes by part, from the real modules on the meta device."""
    llava = meta_llava(name, DTYPE)
    rpn = meta_rpn(llava, DTYPE)
    llava.head_ids = [llava.tokenizer.bos_token_id] * HEAD_TOKENS

    def attention_inputs(embeds: Any, mask: Any, positions: Any, cache: Any) -> AttentionInputs:
        # Building a mask reads values, which meta tensors do not have.
        rotary = llava.decoder.rotary_emb(embeds, position_ids=positions[0])
        return AttentionInputs(None, rotary)

    llava.attention_inputs = attention_inputs  # type: ignore[method-assign]
    pixels = torch.zeros(3, llava.side, llava.side, device="meta", dtype=DTYPE)
    image = ImageInput(pixels, llava.image_grid(Image.new("RGB", (1, 1))))
    (alone,), (prefix,) = prefill(llava, None, [image]), prefill(llava, rpn, [image])
    parts = {
        "language_model": llava.model.model.language_model,
        "lm_head": llava.model.lm_head,
        "vision_tower": llava.model.model.vision_tower,
        "projector": llava.model.model.multi_modal_projector,
        "rpn": rpn,
    }
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    base = sum(count for part, count in counts.items() if part != "rpn")
    return {
        "parameters": {**counts, "base": base},
        "rpn_share_of_base": counts["rpn"] / base,
        "weight_bytes": {"base": base * DTYPE.itemsize, "rpn": counts["rpn"] * DTYPE.itemsize},
        "prefix_tokens": prefix.length,
        "prefix_bytes": {
            "backbone_kv": alone.nbytes,
            "rpn": prefix.nbytes - alone.nbytes,
            "all": prefix.nbytes,
        },
    }


def size_table(shapes: dict[str, dict[str, Any]]) -> str:
    """Format the sizes as a Markdown table."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("base, parameters", lambda s: f"{s['parameters']['base'] / 1e6:,.0f} M"),
        ("RPN, parameters", lambda s: f"{s['parameters']['rpn'] / 1e6:,.0f} M"),
        ("RPN, of the base", lambda s: f"{s['rpn_share_of_base']:.1%}"),
        ("base, weights", lambda s: f"{s['weight_bytes']['base'] / 2**30:.2f} GiB"),
        ("RPN, weights", lambda s: f"{s['weight_bytes']['rpn'] / 2**30:.2f} GiB"),
        ("prefix, tokens", lambda s: str(s["prefix_tokens"])),
        ("prefix, backbone's KV", lambda s: f"{s['prefix_bytes']['backbone_kv'] / 2**20:.0f} MiB"),
        ("prefix, the RPN's", lambda s: f"{s['prefix_bytes']['rpn'] / 2**20:.0f} MiB"),
    ]
    lines = [f"| bfloat16 | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
    for title, cell in rows:
        lines.append(f"| {title} | {' | '.join(cell(s) for s in shapes.values())} |")
    return "\n".join(lines)


# --- one run ---------------------------------------------------------------------------------


def _write(folder: Path, shape: str, layers: int | None, answer: Any) -> None:
    stages = Stages()
    with stages.stage("write the weights"):
        build(folder, shape, DTYPE, layers)
    answer.put({"stages": stages.by_name, "peak_resident": _peak()})


def _ask(folder: Path, preset: str, new_tokens: int, cells: int, answer: Any) -> None:
    stages = Stages()
    with stages.stage("import"):
        from sdrpn_eval.model import LlavaSdrpn
    with stages.stage("load"):
        plugin = LlavaSdrpn(
            pretrained=str(folder),
            rpn=str(folder / "rpn"),
            device="cpu",
            dtype=str(DTYPE).removeprefix("torch."),
            preset=preset,
        )
    engine = plugin.engine
    force_region(engine, middle_box(engine.backbone.grid, cells))
    words = [q.text for q in questions(engine.backbone, [2], 60, (640, 480))]
    (image,) = images(1)
    said = []
    for number, text in enumerate(words, start=1):
        with stages.stage(f"question {number}"):
            asked = Question(text, (image,), zoom=preset_zoom(preset))
            said += engine.ask_batch([asked], generation_of(new_tokens))
    answer.put(
        {
            "stages": stages.by_name,
            "peak_resident": _peak(),
            "crop_tokens": [a.crop_tokens for a in said],
            "regions": [[list(box) for box in a.regions] for a in said],
            "new_tokens": [a.new_tokens for a in said],
            "prefix_cache": {"images": len(engine.prefixes), "bytes": engine.prefixes.nbytes},
            "dtype": str(engine.backbone.dtype).removeprefix("torch."),
        }
    )


def _peak() -> int:
    """Peak resident bytes of this process, as recorded by the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _apart(function: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """Run in a new process, so that its memory starts empty."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, answer))
    process.start()
    process.join()
    if process.exitcode:
        what = "was killed, as when memory runs out" if process.exitcode == -9 else "failed"
        raise RuntimeError(f"{function.__name__.strip('_')}: the process {what}")
    return answer.get()


def run(
    folder: Path, shape: str, layers: int | None, preset: str, new_tokens: int, cells: int
) -> dict[str, Any]:
    """Write weights if there are none, load them, ask, and return the measurements.

    Raises ValueError if the disk is too small.
    """
    result: dict[str, Any] = {"shape": shape, "layers": layers, "preset": preset}
    if not (folder / "config.json").exists():
        needed = sum(sizes_of(shape)["weight_bytes"].values()) if layers is None else 0
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(f"{folder}: {needed:,} bytes are needed, {free:,} are free")
        result["writing"] = _apart(_write, folder, shape, layers)
    result["weight_files"] = len(list(folder.rglob("*.safetensors")))
    result["weight_bytes"] = weights = {
        "base": _bytes_in(folder),
        "rpn": _bytes_in(folder / "rpn"),
    }
    result["asking"] = asking = _apart(_ask, folder, preset, new_tokens, cells)
    before, load = (asking["stages"][name] for name in ("import", "load"))
    result["load_growth_over_weights"] = {
        kind: round((load[f"peak_{kind}"] - before[f"peak_{kind}"]) / sum(weights.values()), 3)
        for kind in ("resident", "anonymous", "file")
    }
    known = {
        "Python and libraries": before["peak_resident"],
        "base weights": weights["base"],
        "RPN weights": weights["rpn"],
        "the image's prefix": asking["prefix_cache"]["bytes"],
    }
    rest = asking["peak_resident"] - sum(known.values())
    result["peak_resident_by_part"] = {**known, "the rest": rest}
    return result


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def part_table(result: dict[str, Any]) -> str:
    """Format the parts of the peak and the growth while loading as Markdown."""
    lines = ["| at the peak | GiB |", "|---|---|"]
    for part, size in result["peak_resident_by_part"].items():
        lines.append(f"| {part} | {size / 2**30:.2f} |")
    lines.append(f"| together | {result['asking']['peak_resident'] / 2**30:.2f} |")
    growth = result["load_growth_over_weights"]
    said = ", ".join(f"{kind} memory {times:.2f}" for kind, times in growth.items())
    return "\n".join([*lines, "", f"Growth while loading, in times the weights: {said}."])


def main() -> None:
    """Run the benchmark from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    p.add_argument("--out", type=Path, help="JSON file; an earlier run in it is kept")
    p.add_argument("--run", type=Path, metavar="FOLDER", help="also run, with weights in FOLDER")
    p.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="of --run")
    p.add_argument("--layers", type=int, help="of --run: number of decoder layers")
    p.add_argument("--preset", choices=["paper", "fast"], default="paper", help="of --run")
    p.add_argument("--new-tokens", type=int, default=4, help="new tokens per answer")
    p.add_argument("--cells", type=int, default=8, help="side of the region, cells of 24")
    args = p.parse_args()
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    result["machine"] = describe_machine(torch.device("cpu"))
    result["shapes"] = {name: sizes_of(name) for name in ("7b", "13b")}
    print(size_table(result["shapes"]))
    if args.run is not None:
        done = run(args.run, args.shape, args.layers, args.preset, args.new_tokens, args.cells)
        result["run"] = done
        writing = done.get("writing", {}).get("stages", {})
        print("\n" + stage_table(writing | done["asking"]["stages"]))
        print("\n" + part_table(done))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
