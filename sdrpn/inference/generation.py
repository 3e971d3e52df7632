"""Answers: suffixes over prefixes, through transformers' generate() or as a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import StoppingCriteria

from sdrpn.backbones.base import Backbone, Segment
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.generation_arguments import (
    SAMPLING,
    check_generation,
    greedy_note,
    switched_off,
    warn_once,
)
from sdrpn.inference.prefix import Prefix, batch_rows, stack


class StopAtStrings(StoppingCriteria):
    """Ends a row once its new text holds one of the strings.

    transformers' own criterion reads a BPE vocabulary and fails on a word-level tokenizer; this
    one asks the tokenizer for the text, which is also what the answer is cut by.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        self.prompt_length: int | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        new = input_ids[:, self.prompt_length :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def generation_arguments(backbone: Backbone, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a request's settings into arguments of generate(): greedy unless told to sample.

    generation: as `check_generation` takes it, which raises ValueError for what cannot be used.
    """
    arguments = check_generation(generation)
    stop = arguments.pop("stop", [])
    if (note := greedy_note(arguments)) is not None:
        warn_once(note)
    if arguments.get("temperature") == 0:
        arguments["do_sample"] = False
    if not arguments.setdefault("do_sample", False):
        # A checkpoint's generation config may carry sampling settings; greedy must not read them.
        arguments = {k: v for k, v in arguments.items() if k not in SAMPLING}
        arguments |= dict.fromkeys(("temperature", "top_p", "top_k"))
    if stop:
        given = arguments.get("stopping_criteria") or []
        arguments["stopping_criteria"] = [*given, StopAtStrings(backbone.tokenizer, stop)]
    arguments.setdefault("pad_token_id", backbone.pad_token_id)
    return switched_off() | {"max_new_tokens": 128, "num_beams": 1} | arguments


@torch.no_grad()
def generate(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Segment],
    generation: Mapping[str, Any],
) -> list[list[int]]:
    """Answer a batch from its prefixes; returns the new token ids of each row, end token left out.

    generate() begins behind the prefix: its first forward is the suffix alone, which also gives the
    first new token.
    """
    arguments = generation_arguments(backbone, generation)
    batch = batch_rows(suffixes, [p.length for p in prefixes])
    length = batch.prefix_length
    cache = stack([p.kv for p in prefixes])
    if arguments["num_beams"] > 1:
        # generate() expands the tensors it is given, but not a cache.
        cache.batch_repeat_interleave(arguments["num_beams"])
    # generate() wants embeddings of the whole prompt, and cuts off what the cache holds unread.
    unread = batch.embeds.new_zeros(1, 1, 1).expand(len(suffixes), length, batch.embeds.shape[-1])
    # No id is embedded: they count for repetition penalties.
    # Padding repeats the image token, which every row holds already, so no row's penalty moves.
    ids = torch.full_like(batch.mask, backbone.image_token_id)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        ids[row, length - prefix.length : length] = torch.tensor(prefix.ids)
        ids[row, -suffix.length :] = torch.tensor(suffix.ids)
    embeds = torch.cat([unread, batch.embeds], dim=1)
    output = backbone.generate(ids, embeds, batch.mask, batch.positions, cache, arguments)
    return [_until_end(backbone, row, arguments) for row in output[:, ids.shape[1] :].tolist()]


@torch.no_grad()
def losses(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Segment],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Mean loss of each continuation (nats a token), and whether greedy decoding would give it."""
    rows = [
        suffix.followed_by(backbone.text_segment(suffix.next_position, ids))
        for suffix, ids in zip(suffixes, continuations, strict=True)
    ]
    batch = batch_rows(rows, [p.length for p in prefixes])
    cache = stack([p.kv for p in prefixes])
    inputs = batch.attention(backbone, cache)
    hidden = run_layers(backbone.layers, batch.embeds, inputs, cache)
    return [_loss(backbone, state, c) for state, c in zip(hidden, continuations, strict=True)]


def _loss(backbone: Backbone, hidden: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    logits = backbone.logits(hidden[-len(continuation) - 1 : -1]).float()
    target = torch.tensor(continuation, device=logits.device)
    return float(cross_entropy(logits, target)), bool((logits.argmax(-1) == target).all())


# --- prompts without a prefix: no image, or several -----------------------------------------


@torch.no_grad()
def generate_plain(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Image.Image],
    generation: Mapping[str, Any],
) -> list[list[int]]:
    """Answer prompts as stock LLaVA does: ids with placeholders, the images in their order."""
    arguments = generation_arguments(backbone, generation)
    inputs = backbone.plain_inputs(prompts, images)
    output = backbone.model.generate(**inputs, **arguments)
    width = inputs["input_ids"].shape[1]
    return [_until_end(backbone, row, arguments) for row in output[:, width:].tolist()]


@torch.no_grad()
def losses_plain(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Image.Image],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """As `losses`, for prompts without a prefix."""
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    inputs = backbone.plain_inputs(rows, images)
    hidden = backbone.model.model(**inputs).last_hidden_state
    results = []
    for state, continuation in zip(hidden, continuations, strict=True):
        logits = backbone.model.lm_head(state[-len(continuation) - 1 : -1]).float()
        target = torch.tensor(continuation, device=logits.device)
        greedy = bool((logits.argmax(-1) == target).all())
        results.append((float(cross_entropy(logits, target)), greedy))
    return results


def _end_ids(backbone: Backbone, arguments: Mapping[str, Any]) -> set[int]:
    """The tokens that end an answer: those asked for, else the checkpoint's and the tokenizer's."""
    given = arguments.get("eos_token_id")
    known = [backbone.eos_token_id, backbone.model.generation_config.eos_token_id]
    ends: set[int] = set()
    for one in known if given is None else [given]:
        ends |= set(one) if isinstance(one, list | tuple) else {one}
    return ends - {None}


def _until_end(backbone: Backbone, ids: list[int], arguments: Mapping[str, Any]) -> list[int]:
    """An answer's own tokens: up to its end token.

    A row that a stopping criterion ended has none, but padding behind it. Elsewhere padding is
    something the model said, which does not end an answer.
    """
    ends = _end_ids(backbone, arguments)
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    if end is not None:
        return ids[:end]
    while arguments.get("stopping_criteria") and ids and ids[-1] == arguments["pad_token_id"]:
        ids = ids[:-1]
    return ids
