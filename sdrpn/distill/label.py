"""Make pseudo-labels: the frozen model answers, and its own attention says where it looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sdrpn.answer import Suffix, generate
from sdrpn.distill.pseudo_labels import IGNORED, judge
from sdrpn.proposers import Look, known_labels, response_attention
from sdrpn.zoom import Question, ZoomLlava

EMPTY_RESPONSE = "empty response"


@dataclass(frozen=True)
class Labelled:
    """One question's pseudo-labels and the maps they were made from (METHOD section 4).

    grounding, sink: float16 [T]. labels: int8 [T] of 1, 0, -100. reason: why a sample gave none.
    """

    response: str
    grounding: np.ndarray
    sink: np.ndarray
    labels: np.ndarray
    reason: str | None = None


def label(
    zoom: ZoomLlava, questions: Sequence[Question], *, batch_size: int = 16
) -> Iterator[Labelled]:
    """Label questions on one image each, in their order, with a progress bar.

    zoom: an engine that knows which heads point (its `labels`); its proposer is not asked.
    """
    with tqdm(total=len(questions), desc="Labelling") as progress:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            yield from label_batch(zoom, batch)
            progress.update(len(batch))


def label_batch(zoom: ZoomLlava, questions: Sequence[Question]) -> list[Labelled]:
    """Label one batch: answer greedily, then read the chosen attention rows of the answers."""
    llava, config = zoom.llava, known_labels(zoom.models)
    prefixes = zoom.read([q.images[0] for q in questions])
    looks = [
        Look(prefix, llava.view(q.images[0]), tuple(llava.question_ids(q.text)), zoom.zoom)
        for prefix, q in zip(prefixes, questions, strict=True)
    ]
    words = [Suffix(look.question) for look in looks]
    greedy = {"max_new_tokens": config.max_new_tokens}
    responses = generate(llava, prefixes, words, greedy)
    spoken = [i for i, response in enumerate(responses) if response]
    maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if spoken:
        asked, said = [looks[i] for i in spoken], [responses[i] for i in spoken]
        grounding, sink = response_attention(zoom.models, asked, said)
        maps = {i: (grounding[n], sink[n]) for n, i in enumerate(spoken)}
    results = []
    for i, response in enumerate(responses):
        text = llava.tokenizer.decode(response, skip_special_tokens=True).strip()
        if i not in maps:
            nothing = np.zeros(llava.image_tokens, np.float16)
            ignored = np.full(llava.image_tokens, IGNORED, np.int8)
            results.append(Labelled(text, nothing, nothing, ignored, EMPTY_RESPONSE))
            continue
        # From the maps as they are kept, so that relabelling gives the same again.
        half = [one.astype(np.float16) for one in maps[i]]
        labels, reason = judge(half[0].astype(np.float32), half[1].astype(np.float32), config)
        results.append(Labelled(text, half[0], half[1], labels, reason))
    return results
