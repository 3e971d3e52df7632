"""The first new token of a prompt that has passed all layers, without a forward pass.

generate() starts by running the last token of the prompt. Where all of the prompt has been run
before, the state of that token is known, and so are the first logits. They are enough for greedy
search; other decoding strategies keep state of their own, and run the last token again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from sdrpn.backbones.base import Backbone
from sdrpn.inference.generation_arguments import SAMPLING
from sdrpn.inference.prefix import Context
from sdrpn.inference.stopping import StopAtStrings, end_tokens

_GREEDY = frozenset(
    {
        *SAMPLING,
        "_from_model_config",
        "early_stopping",
        "eos_token_id",
        "length_penalty",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "num_beams",
        "num_return_sequences",
        "pad_token_id",
        "repetition_penalty",
        "stopping_criteria",
        "transformers_version",
        "use_cache",
    }
)
"""Arguments of generate() that `first_tokens` respects, or that do not affect greedy search."""


def is_greedy(backbone: Backbone, arguments: Mapping[str, Any]) -> bool:
    """Return whether the first token is the largest of the logits that `first_tokens` computes.

    Args:
        backbone: The base model, whose generation config has the defaults.
        arguments: Arguments of generate().
    """
    config = copy.deepcopy(backbone.model.generation_config)
    objects = config.update(**arguments)
    given = {**config.to_diff_dict(), **objects}
    names = {k for k, v in given.items() if v is not None and v is not False}
    criteria = objects.get("stopping_criteria") or []
    own = all(isinstance(one, StopAtStrings) for one in criteria)
    return names <= _GREEDY and config.num_beams in (None, 1) and own


def first_tokens(
    backbone: Backbone, contexts: Sequence[Context], arguments: Mapping[str, Any]
) -> list[tuple[int, float]]:
    """Choose the first token of each row, as greedy search does.

    Args:
        backbone: The base model.
        contexts: Complete prompts.
        arguments: Arguments of generate(), for which `is_greedy` holds.

    Returns:
        For each row, the token and its probability before penalties.
    """
    states = [context.state for context in contexts if context.state is not None]
    assert len(states) == len(contexts)
    logits = backbone.logits(torch.stack(states)).float()
    scores = logits.clone()
    penalty = _setting(backbone, arguments, "repetition_penalty")
    if penalty is not None and penalty != 1:
        penalize = RepetitionPenaltyLogitsProcessor(penalty)
        for row, context in enumerate(contexts):
            ids: Any = torch.tensor([context.ids], device=scores.device)
            scores[row] = penalize(ids, scores[row : row + 1].clone())[0]
    if _setting(backbone, arguments, "min_new_tokens"):
        scores[:, end_tokens(_setting(backbone, arguments, "eos_token_id"))] = -torch.inf
    chosen: Tensor = scores.argmax(-1, keepdim=True)
    probabilities = logits.softmax(-1).gather(-1, chosen)
    return [*zip(chosen[:, 0].tolist(), probabilities[:, 0].tolist(), strict=True)]


def after_first(backbone: Backbone, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of generate() for a prompt that ends with the first new token."""
    least = _setting(backbone, arguments, "min_new_tokens")
    rest = dict(arguments) | {"max_new_tokens": arguments["max_new_tokens"] - 1}
    if least:
        rest["min_new_tokens"] = least - 1
    if arguments.get("stopping_criteria"):
        rest["stopping_criteria"] = [
            StopAtStrings(one.tokenizer, one.strings, known=1)
            for one in arguments["stopping_criteria"]
        ]
    return rest


def _setting(backbone: Backbone, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of generate(), or else the checkpoint's default."""
    return arguments.get(name, getattr(backbone.model.generation_config, name))
