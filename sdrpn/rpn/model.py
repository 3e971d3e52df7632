"""The region proposal network: R-1 decoder layers of its own and a map head (METHOD section 2)."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from sdrpn.backbones.fingerprint import base_hash
from sdrpn.backbones.llava15 import Llava
from sdrpn.config import LabelConfig, RPNConfig, ZoomConfig
from sdrpn.convert import published
from sdrpn.convert.checkpoint import Source, read_all
from sdrpn.inference.decoder import Span, run_layers
from sdrpn.io.atomic import remove_parts, whole, write_json
from sdrpn.io.checkpoints import check_finite, copy_weights, execution_device

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "rpn.safetensors"
CONFIG_FILE = "config.json"
WHAT = "an RPN checkpoint"

CARD = """---
library_name: sdrpn
tags: [sd-rpn, region-proposal, llava]
base_model: {base_model}
---
# Region proposal network for {base_model}

Says where LLaVA-1.5 should look again (SD-RPN, arXiv 2509.16944). It reads the backbone's hidden
state behind layer {branch} and has {parameters:,} parameters of its own ({depth} layers).

```python
from sdrpn import ZoomLlava
zoom = ZoomLlava.from_pretrained("{base_model}", rpn="path-or-id-of-this-folder")
```

## Training facts

{facts}
"""


def llama_config(config: RPNConfig, attn_implementation: str) -> LlamaConfig:
    """The LLaMA shape of the RPN's decoder layers."""
    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=float(config.rms_norm_eps),  # JSON may write a whole number
        num_hidden_layers=config.depth - 1,
    )
    shape._attn_implementation = attn_implementation
    return shape


class RPN(nn.Module, ModelHubMixin):
    """A question's look at an image: hidden state behind backbone layer B-1 -> RoI logits.

    Its decoder layers start as copies of the backbone's; once trained, their keys and values are
    their own, so a cached prefix must keep the RPN's KV beside the backbone's.
    """

    def __init__(self, config: RPNConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.facts: dict[str, Any] = {}
        shape = llama_config(config, attn_implementation)
        head_dim = config.hidden_size // config.num_attention_heads
        self.layers = nn.ModuleList(LlamaDecoderLayer(shape, i) for i in range(config.depth - 1))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.map_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * head_dim, bias=False
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * head_dim, bias=False
        )

    @property
    def device(self) -> torch.device:
        return self.q_proj.weight.device

    def forward(self, hidden: Tensor, span: Span, cache: Cache | None = None) -> Tensor:
        """Run the RPN's layers and both norms.

        hidden: [B, N, C] behind backbone layer B-1. Returns [B, N, C], what the map head reads.
        """
        hidden = hidden.to(self.device)
        hidden = run_layers(enumerate(self.layers), hidden, span.to(self.device), cache)
        return self.map_norm(self.norm(hidden))

    def image_keys(self, states: Tensor) -> Tensor:
        """Keys of the image tokens, without rotary embedding: [B, T, C] -> [B, T, kv heads x d]."""
        return self.k_proj(states)

    def roi_logits(self, last: Tensor, image_keys: Tensor) -> Tensor:
        """The map: dot products of the last prompt token's query with the image tokens' keys.

        last: [B, C], image_keys: [B, T, kv heads x d]. Returns [B, T] in float32, row-major.
        """
        heads = self.config.num_attention_heads
        query = self.q_proj(last).unflatten(-1, (heads, -1)).float()
        keys = image_keys.unflatten(-1, (self.config.num_key_value_heads, -1)).float()
        keys = keys.repeat_interleave(heads // self.config.num_key_value_heads, dim=-2)
        products = torch.einsum("bhd,bthd->bth", query, keys)
        if not self.config.multi_head:
            return products.sum(-1)
        return products.mean(-1) / query.shape[-1] ** 0.5

    # --- where it comes from and goes to -----------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        llava: Llava,
        branch_layer: int = 15,
        depth: int = 3,
        *,
        zoom: ZoomConfig | None = None,
        labels: LabelConfig | None = None,
    ) -> Self:
        """A fresh RPN whose every weight is a copy of the backbone's (METHOD section 2).

        zoom, labels: noted in its config, for those who use it.
        """
        if branch_layer + depth > llava.num_layers:
            raise ValueError(
                f"branch_layer {branch_layer} + depth {depth} needs as many layers, "
                f"the backbone has {llava.num_layers}"
            )
        config = RPNConfig(
            branch_layer=branch_layer,
            depth=depth,
            base_model=llava.name,
            base_hash=base_hash(llava, branch_layer),
            zoom=zoom or ZoomConfig(),
            labels=labels,
            padding=llava.padding,
            **shape_of(llava),
        )
        rpn = cls(config, llava.text_config._attn_implementation)
        backbone = [layer for _, layer in llava.layers]
        for own, theirs in zip(rpn.layers, backbone[branch_layer:], strict=False):
            copy_weights(own, theirs)
        head: Any = backbone[branch_layer + depth - 1]
        copy_weights(rpn.norm, llava.model.model.language_model.norm)
        copy_weights(rpn.map_norm, head.input_layernorm)
        copy_weights(rpn.q_proj, head.self_attn.q_proj)
        copy_weights(rpn.k_proj, head.self_attn.k_proj)
        return rpn.to(device=execution_device(head), dtype=llava.dtype)

    def check_fits(self, llava: Llava) -> None:
        """Raise ValueError unless this RPN's sizes are the base model's."""
        wrong = [
            f"{name} {getattr(self.config, name)} (the model has {value})"
            for name, value in shape_of(llava).items()
            if getattr(self.config, name) != value
        ]
        if self.config.branch_layer + self.config.depth > llava.num_layers:
            reach = f"{self.config.branch_layer} + {self.config.depth} layers"
            wrong.append(f"{reach} (the model has {llava.num_layers})")
        if wrong:
            base = self.config.base_model or "an unnamed base model"
            raise ValueError(
                f"this RPN was made for {base} and does not fit {llava.name}: it has "
                + ", ".join(wrong)
            )

    def attach(self, llava: Llava, dtype: torch.dtype | None = None) -> Self:
        """Put the RPN where the backbone's layer B is, with its attention backend.

        dtype: default the backbone's; training keeps float32 weights over a half backbone. Warns
        where the backbone's weights are not those it was trained on, or its images are padded
        otherwise.
        """
        self.check_fits(llava)
        self._warn_of_padding(llava)
        self._tell_of_another_base(llava)
        layer: Any = llava.layers[self.config.branch_layer][1]
        for own in self.layers:
            attention: Any = own.self_attn
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = llava.text_config._attn_implementation
        return self.to(device=execution_device(layer), dtype=dtype or llava.dtype)

    def _warn_of_padding(self, llava: Llava) -> None:
        own = self.config.padding
        if own and own != llava.padding:
            logger.warning(
                "this RPN was trained with padding=%s and %s is loaded with padding=%s: its maps "
                "may be off; load it with padding=%s",
                own,
                llava.name,
                llava.padding,
                own,
            )

    def _tell_of_another_base(self, llava: Llava) -> None:
        own = self.config.base_hash
        found = base_hash(llava, self.config.branch_layer) if own else ""
        if found and found != own:
            logger.warning(
                "this RPN was trained on %s (weights %s) and now reads %s (weights %s): its maps "
                "may be off; train one for this base with `sdrpn train`",
                self.config.base_model or "an unnamed base model",
                own,
                llava.name,
                found,
            )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write a folder that `from_pretrained` reads; options: ModelHubMixin's.

        Raises ValueError, before anything is written over, for weights that are not finite.
        """
        mend = "its training went wrong: try a lower learning rate"
        check_finite(self.state_dict().items(), f"the RPN for {save_directory}", mend)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        remove_parts(save_directory)
        with whole(save_directory / WEIGHTS_FILE) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        write_json(save_directory / CONFIG_FILE, self.config.to_dict() | {"facts": self.facts})
        # The mixin would keep a card that is already there; a retrained RPN needs its own.
        with whole(save_directory / "README.md") as part:
            self.generate_model_card().save(part)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README of a saved RPN: what it belongs to and how it was trained."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        return ModelCard(
            CARD.format(
                base_model=self.config.base_model or "unknown",
                branch=self.config.branch_layer - 1,
                depth=self.config.depth,
                parameters=sum(p.numel() for p in self.parameters()),
                facts=facts or "Not trained: a copy of the backbone's layers.",
            )
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> Self:
        """Load an RPN from a folder or hub id: ours, or one published by the paper's authors.

        download: hf_hub_download's revision, cache_dir, token, ... Raises FileNotFoundError where
        something is missing, OSError where the Hub does not hand it out, with the cause and its
        remedy, ValueError where a name, a shape or a setting does not fit.
        """
        source = Source(str(pretrained_model_name_or_path), **download)
        values = source.config(WHAT)
        if published.is_published(values):
            return cls._from_published(values, source)
        weights = source.fetch(WEIGHTS_FILE, WHAT)
        facts = values.pop("facts", {})
        try:
            config = RPNConfig.from_dict(values)
            if not isinstance(facts, dict):
                raise ValueError(f"facts must be an object, got {facts!r:.80}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source.name} is not an sdrpn RPN checkpoint: {error}") from error
        tensors = read_all(weights)
        try:
            rpn = cls._of(config, tensors, facts)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch's, for sizes too
            told = " ".join(str(error).split())[:500]
            raise ValueError(f"{source.name}: weights and config disagree: {told}") from error
        check_finite(tensors.items(), source.name)
        return rpn

    @classmethod
    def _from_published(cls, values: Mapping[str, Any], source: Source) -> Self:
        """An RPN out of a checkpoint in the original LLaVA layout."""
        config = published.read_config(values, source)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        tensors = published.read_tensors(source, config.depth, shapes)
        check_finite(tensors.items(), source.name)
        return cls._of(config, tensors, {"converted from": source.name})

    @classmethod
    def _of(cls, config: RPNConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """An RPN with these weights, frozen, in the widest of their types."""
        # Each layer has several tensors; and no more layers are built than are held.
        if config.depth > len(tensors):
            raise RuntimeError(f"{len(tensors)} tensors do not make {config.depth} layers")
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors.values()})
        with torch.device("meta"):
            rpn = cls(config)
        rpn.load_state_dict({k: t.to(dtype) for k, t in tensors.items()}, assign=True)
        rpn.facts = facts
        return rpn.eval().requires_grad_(False)


def shape_of(llava: Llava) -> dict[str, Any]:
    """The fields of an RPNConfig that must be the backbone's own."""
    text = llava.text_config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    return {name: getattr(text, name) for name in names} | {"image_tokens": llava.image_tokens}
