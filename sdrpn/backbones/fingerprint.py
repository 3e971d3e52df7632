"""Fingerprints of model weights, to detect an RPN used with another base model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from sdrpn.backbones.base import Backbone
from sdrpn.io.checkpoints import named_weights

ROWS = 64
"""Approximate number of rows hashed per matrix; fine-tuning changes every row."""


def base_hash(backbone: Backbone, branch_layer: int) -> str:
    """Hash the weights below the RPN: the projector and the decoder layers before `branch_layer`.

    The hash covers the signs of the weights: casts between float32, float16 and bfloat16 preserve
    them, and training flips the signs of many small weights.

    Args:
        backbone: The base model.
        branch_layer: B, the number of decoder layers to hash.

    Returns:
        16 hexadecimal digits, or "" for quantized weights, which have no comparable hash.
    """
    modules = [backbone.projector, *(layer for _, layer in backbone.layers[:branch_layer])]
    return weights_hash(modules)


def weights_hash(modules: Sequence[nn.Module]) -> str:
    """Hash the matrices of `modules`; see `base_hash`.

    Returns:
        16 hexadecimal digits, or "" for quantized or meta weights.
    """
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
