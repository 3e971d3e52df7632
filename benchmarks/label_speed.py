"""Compare labelling with answering one by one and returning all attention matrices.

    python -m benchmarks.label_speed --out docs/label_speed.json

The usual way to read attention is eager attention with `output_attentions=True`, which returns
every layer, head, row and column, one question at a time. sdrpn answers in batches over shared
prefixes with fused kernels, and recomputes only the rows of the answer in the layers that are read.
Both answer the same questions with the same number of new tokens, interleaved within every repeat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.shapes import SHAPES, label_heads, random_llava
from benchmarks.workload import Clock, describe_machine, questions
from sdrpn.backbones.llava15 import Llava15
from sdrpn.distill.label import label_batch
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generation_arguments

Label = Callable[[Sequence[Question]], Any]


def one_by_one(llava: Llava15, new_tokens: int) -> Label:
    """Label with transformers: eager attention, all matrices returned, one question at a time."""
    config = label_heads()
    arguments = generation_arguments(llava, {"max_new_tokens": new_tokens})
    start, count = len(llava.head_ids), llava.image_tokens

    @torch.no_grad()
    def label(question: Question) -> torch.Tensor:
        (ready,) = llava.preprocess(question.images)
        before = llava.prefix_segment(ready, llava.encode([ready])[0])
        words = llava.prompt_ids(question.text).after
        after = llava.suffix_segment(before.next_position, words)
        prompt = before.followed_by(after).embeds[None]
        output: Any = llava.model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
            **{**arguments, "output_attentions": True, "return_dict_in_generate": True},
        )
        read = config.grounding[0]
        # Of every step the row of its last token, which predicts the next one.
        heads, image = list(read.heads or ()), slice(start, start + count)
        rows = [step[read.layer][0, heads, -1, image] for step in output.attentions]
        return torch.stack(rows).mean((0, 1))

    def run(batch: Sequence[Question]) -> list[torch.Tensor]:
        llava.model.set_attn_implementation("eager")
        try:
            return [label(question) for question in batch]
        finally:
            llava.model.set_attn_implementation("sdpa")

    return run


def ours(llava: Llava15, new_tokens: int, batch_size: int) -> Label:
    """Label as `sdrpn label` does, with an empty prefix cache."""
    heads = replace(label_heads(), max_new_tokens=new_tokens)
    zoom = ZoomModel(llava, proposer="none", labels=heads)

    def run(asked: Sequence[Question]) -> None:
        zoom.prefixes.clear()
        fresh = [replace(question) for question in asked]
        for start in range(0, len(fresh), batch_size):
            label_batch(zoom, fresh[start : start + batch_size])

    return run


def measure(
    shape: str, batch_sizes: Sequence[int], per_image: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Time both ways: seconds per question and their ratio."""
    llava = random_llava(shape)
    # No answer ends early, so both ways read the same number of rows.
    llava.model.generation_config.eos_token_id = None
    images = -(-max(batch_sizes) // per_image)
    asked = questions(llava, [per_image] * images, 20, (640, 480))
    ways: dict[str, Label] = {"one by one": one_by_one(llava, new_tokens)}
    ways |= {f"batch size {size}": ours(llava, new_tokens, size) for size in batch_sizes}
    clock, seconds = Clock(llava.device), {name: [] for name in ways}
    for repeat in tqdm(range(repeats + 1), "repeats"):
        for name, label in ways.items():
            started = clock.now()
            label(asked)
            if repeat:  # the first warms up
                seconds[name].append((clock.now() - started) / len(asked))
    slow = seconds["one by one"]
    rows = []
    for name, own in seconds.items():
        paired = [s / o for s, o in zip(slow, own, strict=True)]
        rows.append(
            {
                "way": name,
                "seconds_per_question": median(own),
                "times_faster": median(slow) / median(own),
                "spread": [min(paired), max(paired)],
            }
        )
        print(rows[-1])
    return {
        "machine": describe_machine(llava.device),
        "shape": shape,
        "questions_per_image": per_image,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--out", type=Path, help="JSON file to write")
    p.add_argument("--shape", choices=sorted(SHAPES), default="small")
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    p.add_argument("--per-image", type=int, default=1, help="questions per image")
    p.add_argument("--new-tokens", type=int, default=8, help="new tokens per answer")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args(arguments)
    result = measure(args.shape, args.batch_sizes, args.per_image, args.new_tokens, args.repeats)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
