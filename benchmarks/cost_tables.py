"""Qwen2.5-VL's operations by closed formula, and the memory of its prefixes and RPNs.

    python -m benchmarks.cost_tables --into docs/speed.md

Needs no weights: everything follows from the configurations in `benchmarks.shapes_qwen`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.flops import FORMULAS, Load, floor
from benchmarks.flops_qwen import QwenSizes
from benchmarks.plot_throughput import format_table, put
from benchmarks.shapes_qwen import FIRST_TOKENS, QWEN_SHAPES, QwenShape, qwen_config
from sdrpn.backbones.qwen25_vl_published import DEPTH, branch_layer
from tests.helpers.qwen_tiny import build_tokenizer

HEAD_TOKENS = 15
"""Tokens before an image with Qwen's tokenizer, which random shapes do not have."""

BYTES = 2
"""Of a bfloat16 number."""

SIDES = {4096: 64, 1024: 32, FIRST_TOKENS: 24}
"""Cells per side of a square image, by its number of tokens."""

REFERENCE = ("stock", 4096)
SYSTEMS = {
    REFERENCE: "stock, 4096 tokens an image",
    ("stock", 1024): "stock, 1024 tokens",
    ("stock", 576): "stock, 576 tokens",
    ("two_pass", 576): "two passes, as published, 576 + 576",
    ("sdrpn", 576): "sdrpn, 576 + 576",
    ("none", 576): "no second look, ours, 576",
}
QUESTION, NEW = 60, 4
BEGIN, END = "<!-- cost -->", "<!-- end of cost -->"


def sizes_of(shape: QwenShape, tokens: int) -> QwenSizes:
    """Sizes of a shape with a square image of so many tokens and a square crop of 576."""
    side, crop_side = SIDES[tokens], SIDES[FIRST_TOKENS]
    return QwenSizes.of_config(
        qwen_config(shape, build_tokenizer()),
        head_tokens=HEAD_TOKENS,
        branch_layer=branch_layer(shape.hidden, shape.layers),
        depth=DEPTH,
        grid=(side, side),
        crop_grid=(crop_side, crop_side),
    )


def operations(shape: QwenShape, system: str, tokens: int, per_image: int) -> float:
    """Operations of a question, as torch's counter counts them."""
    return sum(FORMULAS[system](sizes_of(shape, tokens), _load(system, per_image)).values())


def lower_bound(shape: QwenShape, system: str, tokens: int, per_image: int) -> float:
    """Operations of a question without masked keys and unused outputs; see `flops.floor`."""
    return sum(floor(system, sizes_of(shape, tokens), _load(system, per_image)).values())


def _load(system: str, per_image: int) -> Load:
    crop = FIRST_TOKENS if system in ("two_pass", "sdrpn") else 0
    return Load(per_image, QUESTION, crop, NEW)


def prefix_bytes(shape: QwenShape, image_tokens: int) -> int:
    """Bytes of a prefix in bfloat16: KV of all layers and of the RPN's own, and its image keys."""
    width = shape.hidden // shape.heads * shape.kv_heads
    layers = shape.layers + DEPTH - 1
    return BYTES * width * (2 * layers * (HEAD_TOKENS + image_tokens) + image_tokens)


def rpn_parameters(shape: QwenShape) -> int:
    """Parameters of an RPN: R-1 layers, and of the last one the norm, queries and keys."""
    hidden, width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    queries, keys = hidden * (hidden + 1), width * (hidden + 1)
    layer = queries + 2 * keys + hidden**2 + 3 * hidden * shape.intermediate + 2 * hidden
    return (DEPTH - 1) * layer + hidden + queries + keys


def ratio(shape: QwenShape, per_image: int, *, unmasked: bool = False) -> float:
    """Operations of sdrpn over those of the stock with 4096 tokens.

    unmasked: count only necessary operations of both, which halves the attention of a prefill; an
    image of the stock serves one question then too.
    """
    count = lower_bound if unmasked else operations
    return count(shape, "sdrpn", FIRST_TOKENS, per_image) / count(shape, *REFERENCE, 1)


def cost_table(name: str = "7b") -> str:
    """Format operations of a question and their ratios to the stock with 4096 tokens."""
    shape = QWEN_SHAPES[name]
    whole, lines = operations(shape, *REFERENCE, 1), []
    for (system, tokens), label in SYSTEMS.items():
        counted = [operations(shape, system, tokens, per_image) for per_image in (1, 4)]
        lines.append([label, *(f"{own / 1e12:.1f} ({own / whole:.2f})" for own in counted)])
    return format_table(["TFLOP per question (ratio)", "1 per image", "4 per image"], lines)


def memory_table() -> str:
    """Format the memory of prefixes and RPNs by size."""
    lines = []
    for name in ("3b", "7b", "32b", "72b"):
        shape = QWEN_SHAPES[name]
        mib = [f"{prefix_bytes(shape, tokens) / 2**20:,.0f}" for tokens in (576, 4096)]
        parameters = rpn_parameters(shape)
        rpn = [f"{parameters / 1e6:,.0f}", f"{parameters * BYTES / 2**30:.2f}"]
        branch = str(branch_layer(shape.hidden, shape.layers))
        lines.append([name.upper(), branch, *mib, *rpn])
    head = ["size", "B", "prefix of 576 tokens, MiB", "of 4096 tokens, MiB"]
    return format_table([*head, "RPN, millions of parameters", "RPN, GiB"], lines)


def section() -> str:
    """Return both tables."""
    shape = QWEN_SHAPES["7b"]
    one, four = (ratio(shape, per_image, unmasked=True) for per_image in (1, 4))
    return "\n\n".join(
        [
            cost_table(),
            f"Square images, {QUESTION} tokens of the question, {NEW} new ones. Counters take "
            "every query with every key; without masked keys and unused outputs, sdrpn's ratios "
            f"are {one:.2f} and {four:.2f}.",
            memory_table(),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--into", type=Path, help="a page with the two marker comments")
    args = p.parse_args(arguments)
    if args.into is not None:
        put(args.into, section(), markers=(BEGIN, END))
    print(section())


if __name__ == "__main__":
    main()
