"""Generation and loss of answers over prefixes, with transformers' generate()."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

from sdrpn.backbones.base import Backbone, Segment
from sdrpn.backbones.cache import SPARE_TOKENS, cache_of
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.first_token import after_first, first_tokens, is_greedy
from sdrpn.inference.generation_arguments import (
    SAMPLING,
    check_generation,
    greedy_note,
    neutral_arguments,
    warn_once,
)
from sdrpn.inference.prefix import Context, Pieces, Prefix, batch_rows, stack_pieces
from sdrpn.inference.stopping import StopAtStrings, end_tokens


def generation_arguments(backbone: Backbone, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Build the arguments of generate(); decoding is greedy by default.

    Args:
        backbone: The base model.
        generation: Settings of a request; see `check_generation`.

    Raises:
        ValueError: If a setting is unknown, refused or invalid.
    """
    arguments = check_generation(generation)
    stop = arguments.pop("stop", [])
    if (note := greedy_note(arguments)) is not None:
        warn_once(note)
    if arguments.get("temperature") == 0:
        arguments["do_sample"] = False
    if not arguments.setdefault("do_sample", False):
        # Override sampling settings in the checkpoint's generation config.
        arguments = {k: v for k, v in arguments.items() if k not in SAMPLING}
        arguments |= dict.fromkeys(("temperature", "top_p", "top_k"))
    if stop:
        given = arguments.get("stopping_criteria") or []
        arguments["stopping_criteria"] = [*given, StopAtStrings(backbone.tokenizer, stop)]
    arguments.setdefault("pad_token_id", backbone.pad_token_id)
    return neutral_arguments() | {"max_new_tokens": 128, "num_beams": 1} | arguments


@torch.no_grad()
def generate(
    backbone: Backbone,
    contexts: Sequence[Prefix | Context],
    suffixes: Sequence[Segment],
    generation: Mapping[str, Any],
) -> list[list[int]]:
    """Generate answers over prefixes or contexts.

    generate() starts after a prefix: its first forward pass covers only the suffix and yields the
    first new token. After contexts, greedy search needs no pass for it.

    Args:
        backbone: The base model.
        contexts: KV of each row's tokens, all prefixes or all contexts.
        suffixes: Segment after each prefix, or at the end of each context.
        generation: Settings of the request; see `check_generation`.

    Returns:
        New token ids of each row, without the end token.

    Raises:
        ValueError: If a setting is unknown, refused or invalid.
    """
    arguments = generation_arguments(backbone, generation)
    return [ids for ids, _ in _answers(backbone, contexts, suffixes, arguments, scored=False)]


@torch.no_grad()
def generate_with_confidence(
    backbone: Backbone,
    contexts: Sequence[Prefix | Context],
    suffixes: Sequence[Segment],
    generation: Mapping[str, Any],
) -> list[tuple[list[int], float]]:
    """Generate answers as `generate`, with the model's confidence in them.

    Returns:
        New token ids of each row, and the smallest of their probabilities; 0 for an empty answer.
        Probabilities are the model's own, before sampling settings and penalties.
    """
    arguments = generation_arguments(backbone, generation)
    answers = _answers(backbone, contexts, suffixes, arguments, scored=True)
    return [(ids, confidence if ids else 0.0) for ids, confidence in answers]


def _answers(
    backbone: Backbone,
    contexts: Sequence[Prefix | Context],
    suffixes: Sequence[Segment],
    arguments: Mapping[str, Any],
    scored: bool,
) -> list[tuple[list[int], float]]:
    """Generate token ids, and their smallest probability if they are `scored`; 1 for no token."""
    known = [context for context in contexts if isinstance(context, Context)]
    if not known:
        return _run(backbone, contexts, suffixes, arguments, scored)
    if len(known) < len(contexts):
        raise ValueError("a batch must hold prefixes or contexts, not both")
    if not is_greedy(backbone, arguments):
        before = [context.without_last() for context in known]
        return _run(backbone, before, suffixes, arguments, scored)
    found = [([token], p) for token, p in first_tokens(backbone, known, arguments)]
    left, ends = [], _end_ids(backbone, arguments)
    for row, ([token], _) in enumerate(found):
        if token in ends:
            found[row] = ([], 1.0)
        elif arguments["max_new_tokens"] > 1 and not _stops(backbone, token, arguments):
            left.append(row)
    if left:
        rest = _run(
            backbone,
            [known[row] for row in left],
            [backbone.text_segment(suffixes[row].next_position, found[row][0]) for row in left],
            after_first(backbone, arguments),
            scored,
        )
        for row, (ids, confidence) in zip(left, rest, strict=True):
            first, probability = found[row]
            found[row] = ([*first, *ids], min(probability, confidence))
    return found


def _stops(backbone: Backbone, token: int, arguments: Mapping[str, Any]) -> bool:
    """Whether an answer ends with its first token, at a string of `StopAtStrings`."""
    text = backbone.tokenizer.decode([token], skip_special_tokens=True)
    criteria = arguments.get("stopping_criteria") or []
    return any(string in text for one in criteria for string in one.strings)


def _run(
    backbone: Backbone,
    contexts: Sequence[Prefix | Context],
    suffixes: Sequence[Segment],
    arguments: Mapping[str, Any],
    scored: bool,
) -> list[tuple[list[int], float]]:
    """Run transformers' generate(); as `_answers`."""
    batch = batch_rows(suffixes, [c.length for c in contexts])
    length = batch.prefix_length
    room = batch.embeds.shape[1] + SPARE_TOKENS
    cache = stack_pieces([c.pieces for c in contexts], room)
    beams = arguments["num_beams"]
    if beams > 1:
        # generate() expands tensors for beams, but not a cache.
        cache.batch_repeat_interleave(beams)
    # generate() expects embeddings of the full prompt, and drops those in the cache unread.
    unread = batch.embeds.new_zeros(1, 1, 1).expand(len(suffixes), length, batch.embeds.shape[-1])
    # Ids only count for repetition penalties. Padding repeats the image token, which every row
    # contains, so it does not change any penalty.
    ids = torch.full_like(batch.mask, backbone.image_token_id)
    for row, (context, suffix) in enumerate(zip(contexts, suffixes, strict=True)):
        ids[row, length - context.length : length] = torch.tensor(context.ids)
        ids[row, -suffix.length :] = torch.tensor(suffix.ids)
    embeds = torch.cat([unread, batch.embeds], dim=1)
    if scored:
        arguments = {**arguments, "return_dict_in_generate": True, "output_logits": True}
    with upper_masks(backbone, [c.pieces for c in contexts], cache, length, beams):
        output = backbone.generate(ids, embeds, batch.mask, batch.positions, cache, arguments)
    sequences = output.sequences if scored else output
    answers = [
        _until_end(backbone, row, arguments) for row in sequences[:, ids.shape[1] :].tolist()
    ]
    if not scored:
        return [(answer, 1.0) for answer in answers]
    log_probabilities = backbone.model.compute_transition_scores(
        sequences, output.logits, output.get("beam_indices"), normalize_logits=True
    )
    return [
        (answer, float(scores[: len(answer)].min().exp()) if answer else 1.0)
        for answer, scores in zip(answers, log_probabilities, strict=True)
    ]


@contextmanager
def upper_masks(
    backbone: Backbone, rows: Sequence[Pieces], cache: Cache, length: int, beams: int
) -> Iterator[None]:
    """Mask the upper layers on their own, while they hold fewer tokens than the lower ones.

    transformers computes one mask for all layers, from the number of tokens in the first.

    Args:
        backbone: The base model.
        rows: KV of each row.
        cache: The rows' cache, `beams` times.
        length: Columns of the lower layers.
        beams: Rows of the cache per row.
    """
    tokens = [[sum(k.shape[2] for k, _ in pieces) for pieces in layers] for layers in rows]
    depth = min(sum(n == own[0] for n in own) for own in tokens)
    if depth == len(tokens[0]):
        yield
        return
    kept = [own[-1] for own in tokens]
    first = torch.zeros(len(rows), max(kept), dtype=torch.long, device=backbone.device)
    for row, count in enumerate(kept):
        first[row, max(kept) - count :] = 1
    first = first.repeat_interleave(beams, dim=0)
    upper: Any = cache_of([])
    upper.layers = cache.layers[depth:]
    mask: list[Any] = [None]

    def compute(_: Any, args: Any, given: dict[str, Any]) -> None:
        embeds, all_columns = given.get("inputs_embeds"), given.get("attention_mask")
        embeds = backbone.embed(given["input_ids"]) if embeds is None else embeds
        if all_columns is None:  # without any padding
            width = cache.get_seq_length() + embeds.shape[1]
            all_columns = first.new_ones(len(first), width)
        columns = torch.cat([first, all_columns[:, length:]], dim=1)
        mask[0] = backbone.attention_mask(embeds, columns, upper)

    def replace_mask(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, given | {"attention_mask": mask[0]}

    hooks = [backbone.decoder.register_forward_pre_hook(compute, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(replace_mask, with_kwargs=True)
        for _, layer in backbone.layers[depth:]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def losses(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Segment],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Compute the loss of continuations over prefixes.

    Args:
        backbone: The base model.
        prefixes: Prefix of each row.
        suffixes: Segment after each prefix.
        continuations: Token ids to score, after each suffix.

    Returns:
        For each row, the mean loss in nats per token, and whether greedy decoding would generate
        the continuation.
    """
    rows = [
        suffix.followed_by(backbone.text_segment(suffix.next_position, ids))
        for suffix, ids in zip(suffixes, continuations, strict=True)
    ]
    batch = batch_rows(rows, [p.length for p in prefixes])
    cache = batch.cache_of([p.kv for p in prefixes])
    inputs = batch.attention(backbone, cache)
    hidden = run_layers(backbone.layers, batch.embeds, inputs, cache)
    return [loss(backbone, states, ids) for states, ids in zip(hidden, continuations, strict=True)]


def loss(
    backbone: Backbone, states: Float[Tensor, "tokens width"], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Compute the loss of a continuation from the hidden states of a sequence that ends with it.

    Args:
        backbone: The base model.
        states: [N, C], before the final norm.
        continuation: Token ids of the continuation.

    Returns:
        As `losses`.
    """
    return _loss(backbone.logits(_before(states, continuation)), continuation)


def _before(hidden: Tensor, continuation: Sequence[int]) -> Tensor:
    """Select the states that predict a continuation: [N, C] -> [n, C]."""
    return hidden[-len(continuation) - 1 : -1]


def _loss(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Compute the mean loss and whether it is the greedy choice, from logits [n, vocabulary]."""
    logits = logits.float()
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
    """Generate answers with the stock model.

    Args:
        backbone: The base model.
        prompts: Token ids from `Backbone.plain_ids`.
        images: Images of all prompts, in order.
        generation: Settings of the request; see `check_generation`.

    Returns:
        New token ids of each row, without the end token.

    Raises:
        ValueError: If a setting is unknown, refused or invalid.
    """
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
    """Compute the loss of continuations with the stock model.

    Args:
        backbone: The base model.
        prompts: Token ids from `Backbone.plain_ids`.
        images: Images of all prompts, in order.
        continuations: Token ids to score, after each prompt.

    Returns:
        As `losses`.
    """
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    inputs = backbone.plain_inputs(rows, images)
    hidden = backbone.model.model(**inputs).last_hidden_state
    return [
        _loss(backbone.model.lm_head(_before(state, ids)), ids)
        for state, ids in zip(hidden, continuations, strict=True)
    ]


def _end_ids(backbone: Backbone, arguments: Mapping[str, Any]) -> set[int]:
    """Return the end tokens: as requested, or else the checkpoint's and the tokenizer's."""
    requested = arguments.get("eos_token_id")
    defaults = [backbone.eos_token_id, backbone.model.generation_config.eos_token_id]
    return {
        token
        for ids in (defaults if requested is None else [requested])
        for token in end_tokens(ids)
    }


def _until_end(backbone: Backbone, ids: list[int], arguments: Mapping[str, Any]) -> list[int]:
    """Truncate an answer at its end token.

    A row ended by a stopping criterion has no end token, only padding. In other rows, a padding
    token was generated by the model and does not end the answer.
    """
    ends = _end_ids(backbone, arguments)
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    if end is not None:
        return ids[:end]
    while arguments.get("stopping_criteria") and ids and ids[-1] == arguments["pad_token_id"]:
        ids = ids[:-1]
    return ids
