"""Operations of a question, from the numbers of tokens and weights: deterministic, unlike seconds.

A token costs one multiplication per weight that it passes. Products of queries and keys are left
out; at the lengths of LLaVA-1.5-7B they add 2 to 3 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from sdrpn.backbones.base import Backbone
from sdrpn.question import Answer
from sdrpn.rpn.model import RegionProposalNetwork


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Costs:
    """Multiplications of a model's parts.

    Args:
        layer: Of a token in a decoder layer.
        layers: Number of decoder layers, L.
        branch: Number of lower layers, B.
        rpn: Of a token in the RPN.
        encoder: Of an image token in the image encoder.
        head: Of a new token in the language-model head.
        text_before: Text tokens before the image.
    """

    layer: int
    layers: int
    branch: int
    rpn: int
    encoder: int
    head: int
    text_before: int

    @classmethod
    def of(cls, backbone: Backbone, rpn: RegionProposalNetwork | None) -> Costs:
        """Count the weights of a model and its RPN."""
        layers = backbone.num_layers
        table, head = backbone.model.get_input_embeddings(), backbone.model.lm_head
        tied = head.weight is table.weight
        language = _weights(backbone.decoder) + (0 if tied else _weights(head))
        return cls(
            layer=_weights(backbone.layers[0][1]),
            layers=layers,
            branch=layers if rpn is None else rpn.branch_layer,
            rpn=0 if rpn is None else sum(_weights(layer) for layer in rpn.layers),
            encoder=(_weights(backbone.model) - language) * backbone.patches_per_token,
            head=_weights(head),
            text_before=backbone.prefix_length(0),
        )

    def stock(self, answer: Answer) -> int:
        """Multiplications of the stock model for a question that got this answer."""
        prompt = self.text_before + answer.image_tokens + answer.question_tokens
        return self.encoder * answer.image_tokens + self._run(prompt, answer.new_tokens)

    def _run(self, tokens: int, new: int) -> int:
        """Tokens through all layers, then new tokens one by one."""
        return (tokens + new) * self.layer * self.layers + new * self.head

    def question(self, answer: Answer) -> int:
        """Multiplications of a question after its image is prefilled."""
        asked, crop, new = answer.question_tokens, answer.crop_tokens, answer.new_tokens
        looked = answer.roi_map is not None
        cost = self.rpn * asked if looked else 0
        if answer.confidence is not None:
            cost += self._run(asked, answer.first_tokens)
        if answer.confidence is not None and not crop:
            return cost
        if not crop:
            return cost + self._run(asked, new)
        if looked and answer.confidence is None:
            cost += asked * self.layer * self.branch
        cost += self.encoder * answer.encoded_tokens
        if answer.kept_tokens is None:
            return cost + self._run(crop + asked, new)
        lower = (crop + asked) * self.branch
        seen = self.text_before + answer.kept_tokens + crop + asked
        upper = seen * (self.layers - self.branch)
        return cost + (lower + upper) * self.layer + self._run(0, new)

    def image(self, answers: Sequence[Answer]) -> int:
        """Multiplications of prefilling the image of these answers."""
        return _shared([self.parts(answer) for answer in answers])

    def parts(self, answer: Answer) -> Parts:
        """Multiplications of a question that got this answer."""
        prefix = self.text_before + answer.image_tokens
        encoded = self.encoder * answer.image_tokens
        depth = self.layers if answer.kept_tokens is None else self.branch
        return Parts(
            question=self.question(answer),
            prefix=encoded + prefix * self.layer * depth,
            map=self.rpn * prefix if answer.roi_map is not None else 0,
            whole_prefix=encoded + prefix * self.layer * self.layers,
            stock=self.stock(answer),
            without_zoom=self._run(answer.question_tokens, answer.new_tokens),
        )


@dataclass(frozen=True)
class Parts:
    """Multiplications of one question.

    Args:
        question: After its image is prefilled.
        prefix: The prefix that it needs; questions about one image share the largest.
        map: The RPN's part of the prefix.
        whole_prefix: The prefix of an answer without a zoom.
        stock: The stock model's, which encodes the image every time.
        without_zoom: An answer without a look, over the prefix.
    """

    question: int
    prefix: int
    map: int
    whole_prefix: int
    stock: int
    without_zoom: int


def _shared(parts: Sequence[Parts]) -> int:
    return max(part.prefix for part in parts) + max(part.map for part in parts)


def relative_costs(parts: Sequence[Parts], images: Sequence[Hashable]) -> tuple[float, float]:
    """Sum up questions, relative to the stock model; an image is prefilled once.

    Args:
        parts: Of each question, at least one.
        images: The image of each question.

    Returns:
        All multiplications, and those that the second look adds to answers without one from
        prefixes of the same images.
    """
    by_image: dict[Hashable, list[Parts]] = defaultdict(list)
    for part, image in zip(parts, images, strict=True):
        by_image[image].append(part)
    ours = sum(part.question for part in parts) + sum(map(_shared, by_image.values()))
    without = sum(part.without_zoom for part in parts)
    without += sum(own[0].whole_prefix for own in by_image.values())
    stock = sum(part.stock for part in parts)
    return ours / stock, (ours - without) / stock


def relative_cost(costs: Costs, answers: Sequence[Answer], images: Sequence[Hashable]) -> float:
    """Operations per question relative to the stock model's, which encodes the image every time.

    Args:
        costs: Of the model.
        answers: Answers, at least one.
        images: The image of each question; questions about one image share its prefix.
    """
    return relative_costs([costs.parts(answer) for answer in answers], images)[0]
