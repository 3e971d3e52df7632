"""A short fingerprint of a base model's weights, to notice an RPN on another base than its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from sdrpn.backbones.base import Backbone
from sdrpn.io.checkpoints import named_weights

ROWS = 64
"""Rows looked at of each matrix: a few MB in all, and fine-tuning moves every row."""


def base_hash(backbone: Backbone, branch_layer: int) -> str:
    """A hash of what an RPN behind layer `branch_layer` - 1 reads: those layers and the projector.

    Made of the weights' signs, which no rounding between float32, float16 and bfloat16 changes;
    training flips those of small weights, and there are many. Empty where the weights cannot be
    read as numbers (4-bit), which compares with nothing.
    """
    modules = [backbone.projector, *(layer for _, layer in backbone.layers[:branch_layer])]
    return weights_hash(modules)


def weights_hash(modules: Sequence[nn.Module]) -> str:
    """A hash of these modules' matrices, as `base_hash` makes it of a base's."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        signs: dict[str, bytes] = {}
        for name, matrix in named_weights(module):
            if matrix.ndim < 2:
                continue
            if matrix.is_meta or not matrix.is_floating_point():
                return ""
            rows = matrix[:: max(1, len(matrix) // ROWS)]
            shape = str(tuple(matrix.shape)).encode()
            signs[name] = shape + torch.signbit(rows).cpu().numpy().tobytes()
        for name in sorted(signs):
            digest.update(signs[name])
    return digest.hexdigest()
