"""Peak memory of labelling: a closed formula, verified on a small model, for 7B and 13B.

    python -m benchmarks.label_memory --out docs/label_memory.json

Each batch size runs in a separate process. Its peak resident memory, minus that of batch size 1,
gives the bytes per question. The formula counts what grows with the batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, Shape, images, label_heads, question, random_llava
from sdrpn.distill.label import label_batch
from sdrpn.engine import Question, ZoomModel

PROMPT, IMAGE, QUESTION, ANSWER = 35, 576, 20, 128
SIDE = 336


def bytes_a_question(shape: Shape, element: int, answer: int = ANSWER) -> int:
    """Peak bytes of one more question in a batch.

    The KV cache of its prefix, stored and copied into the batch; that of question and answer; the
    activations of one layer over the prefix; and the float32 attention rows of the answer in a
    layer that is read.
    """
    token = 2 * shape.layers * shape.hidden * element
    prefix = (PROMPT + IMAGE) * token
    whole = prefix + (QUESTION + answer) * token
    layer = (PROMPT + IMAGE) * (4 * shape.hidden + 3 * shape.intermediate) * element
    # Scores, masked scores and softmax exist at the same time.
    rows = 3 * shape.heads * answer * (PROMPT + IMAGE + QUESTION + answer) * 4
    return prefix + whole + layer + rows


def full_attention_a_question(shape: Shape, element: int, answer: int = ANSWER) -> int:
    """Bytes per question that `output_attentions=True` would add."""
    length = PROMPT + IMAGE + QUESTION + answer
    return shape.layers * shape.heads * length**2 * element


def weights(shape: Shape, element: int) -> int:
    """Bytes of the language model, the vision tower and the projector."""
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    text = shape.layers * layer + 2 * shape.vocabulary * shape.hidden
    tower = shape.vision_layers * (
        4 * shape.vision_hidden**2 + 2 * shape.vision_hidden * shape.vision_intermediate
    )
    projector = shape.vision_hidden * shape.hidden + shape.hidden**2
    return (text + tower + projector) * element


def _peak(batch: int, answer: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    llava = random_llava("small")
    llava.tokenizer.eos_token = None  # so that every answer has its full length
    llava.model.generation_config.eos_token_id = None
    labels = label_heads()
    zoom = ZoomModel(llava, proposer="none", labels=labels, prefix_cache=0)
    asked = [Question(question(QUESTION), (one,)) for one in images(batch)]
    label_batch(zoom, asked)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured(batch: int) -> int:
    """Label one batch and return the peak resident bytes of the process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(batch, ANSWER, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process for batch {batch} ended with {process.exitcode}")
    return queue.get()


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs=2, default=(4, 20))
    args = parser.parse_args()
    low, high = args.batches
    peaks = {b: measured(b) for b in (low, high)}
    slope = (peaks[high] - peaks[low]) / (high - low)
    formula = bytes_a_question(SHAPES["small"], 4)
    result = {
        "small": {
            "measured_mib_a_question": round(slope / 2**20, 1),
            "formula_mib_a_question": round(formula / 2**20, 1),
            "peak_mib": {str(b): round(p / 2**20) for b, p in peaks.items()},
        }
    }
    for name in ("7b", "13b"):
        shape = SHAPES[name]
        each = bytes_a_question(shape, 2)
        result[name] = {
            "weights_gib": round(weights(shape, 2) / 2**30, 1),
            "mib_a_question": round(each / 2**20),
            "gib_at_batch_16": round((weights(shape, 2) + 16 * each) / 2**30, 1),
            "full_attention_mib_a_question": round(full_attention_a_question(shape, 2) / 2**20),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
