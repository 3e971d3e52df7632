"""The region proposal network: R-1 decoder layers and a map head (SD-RPN, section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sdrpn.backbones.base import AttentionInputs
from sdrpn.backbones.cache import KV
from sdrpn.backbones.registry import family
from sdrpn.config import RPNConfig
from sdrpn.inference.decoder import run_layers, split_heads


class RegionProposalNetwork(nn.Module):
    """Maps the output of backbone layer B-1 to RoI logits over the image tokens.

    The decoder layers are initialised from the backbone's. Their keys and values diverge in
    training, so a prefix stores the RPN's KV in addition to the backbone's.

    Args:
        config: Sizes and variant of the head.
        attention: Attention implementation of the decoder layers, such as sdpa.
    """

    def __init__(self, config: RPNConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        backbone = family(config.backbone)
        own = range(config.depth - 1)
        self.layers = nn.ModuleList(backbone.new_decoder_layer(config, i, attention) for i in own)
        self.norm = backbone.new_norm(config) if config.final_norm else nn.Identity()
        self.map_norm = backbone.new_norm(config)
        width, bias = config.hidden_size, config.head_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.gate = nn.Linear(width, 1) if config.gate else None
        self.rotate = backbone.rotate

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.q_proj.weight.device

    @property
    def branch_layer(self) -> int:
        """B, the index of the backbone layer whose input is the RPN's input."""
        return self.config.branch_layer

    def forward(
        self,
        hidden: Float[Tensor, "batch new width"],
        inputs: AttentionInputs,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch new width"]:
        """Run the decoder layers and the norms.

        Args:
            hidden: [B, N, C] output of backbone layer B-1.
            inputs: Mask and rotary embeddings of these tokens.
            cache: The RPN's KV cache of the previous tokens.

        Returns:
            [B, N, C], the input of the map head.
        """
        hidden = hidden.to(self.device)
        hidden = run_layers(enumerate(self.layers), hidden, inputs.to(self.device), cache)
        return self.map_norm(self.norm(hidden))

    def image_keys(
        self, states: Float[Tensor, "batch cells width"], rotary: KV
    ) -> Float[Tensor, "batch cells channels"]:
        """Compute the keys of image tokens, with rotary embeddings if the head has them.

        Args:
            states: [B, T, C] from `forward`.
            rotary: (cos, sin) of these tokens, [B, T, d] each.

        Returns:
            [B, T, kv heads * d].
        """
        return self._rotated(self.k_proj(states), rotary)

    def roi_logits(
        self,
        last: Float[Tensor, "batch width"],
        rotary: KV,
        image_keys: Float[Tensor, "batch cells channels"],
    ) -> Float[Tensor, "batch cells"]:
        """Compute the map: dot products of the last prompt token's query and the image keys.

        Args:
            last: [B, C] state of the last prompt token, from `forward`.
            rotary: (cos, sin) of that token, [B, 1, d] each.
            image_keys: [B, T, kv heads * d] from `image_keys`.

        Returns:
            [B, T] in float32, row-major.
        """
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        query = self._rotated(self.q_proj(last)[:, None], rotary)[:, 0]
        query = query.unflatten(-1, (heads, -1)).float()
        keys = image_keys.unflatten(-1, (groups, -1)).float()
        keys = keys.repeat_interleave(heads // groups, dim=-2)
        products = torch.einsum("bhd,bthd->bth", query, keys)
        if not self.config.multi_head:
            return products.sum(-1)
        return products.mean(-1) / query.shape[-1] ** 0.5

    def gate_probability(
        self, last: Float[Tensor, "batch width"]
    ) -> Float[Tensor, " batch"] | None:
        """Compute the learned gate's probability that a zoom helps (docs/method.md).

        Args:
            last: [B, C] state of the last prompt token, from `forward`.

        Returns:
            [B] in float32; None without a learned gate.
        """
        if self.gate is None:
            return None
        return self.gate(last).float().sigmoid()[:, 0]

    def _rotated(self, states: Tensor, rotary: KV) -> Tensor:
        if not self.config.rotary_head:
            return states
        rotated = self.rotate(split_heads(states, self.config.head_dim), rotary)
        return rotated.transpose(1, 2).flatten(-2)
