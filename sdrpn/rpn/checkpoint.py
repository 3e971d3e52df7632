"""RPN checkpoints: copies of a backbone, folders of ours, and those that the authors published."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor

from sdrpn.backbones.base import Backbone
from sdrpn.backbones.fingerprint import base_hash
from sdrpn.config import LabelConfig, RPNConfig, ZoomConfig
from sdrpn.io.atomic import atomic_write, remove_partial_files, write_json
from sdrpn.io.checkpoint_files import Source, read_all
from sdrpn.io.checkpoints import check_finite, copy_weights, execution_device
from sdrpn.rpn import published
from sdrpn.rpn.model import RegionProposalNetwork

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "rpn.safetensors"
CONFIG_FILE = "config.json"
WHAT = "an RPN checkpoint"

CARD = """---
library_name: sdrpn
tags: [sd-rpn, region-proposal, {backbone}]
base_model: {base_model}
---
# Region proposal network for {base_model}

Says where the model should look again (SD-RPN, arXiv 2509.16944). It reads the backbone's hidden
state behind layer {branch} and has {parameters:,} parameters of its own ({depth} layers).

```python
from sdrpn import ZoomModel
zoom = ZoomModel.from_pretrained("{base_model}", rpn="path-or-id-of-this-folder")
```

## Training facts

{facts}
"""


class RPN(RegionProposalNetwork, ModelHubMixin):
    """A region proposal network that is copied from a backbone, saved, loaded and published.

    facts: how it was trained, for its model card.
    """

    def __init__(self, config: RPNConfig, attention: str = "sdpa") -> None:
        super().__init__(config, attention)
        self.facts: dict[str, Any] = {}

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        branch_layer: int = 15,
        depth: int = 3,
        *,
        zoom: ZoomConfig | None = None,
        labels: LabelConfig | None = None,
    ) -> RPN:
        """A fresh RPN whose every weight is a copy of the backbone's (docs/method.md).

        zoom, labels: noted in its config, for those who use it.
        """
        if branch_layer + depth > backbone.num_layers:
            raise ValueError(
                f"branch_layer {branch_layer} + depth {depth} needs as many layers, "
                f"the backbone has {backbone.num_layers}"
            )
        config = RPNConfig(
            branch_layer=branch_layer,
            depth=depth,
            base_model=backbone.name,
            base_hash=base_hash(backbone, branch_layer),
            zoom=zoom or backbone.default_zoom,
            labels=labels,
            padding=backbone.preprocessing.get("padding", ""),
            **backbone.rpn_shape(),
        )
        rpn = cls(config, backbone.text_config._attn_implementation)
        layers = [layer for _, layer in backbone.layers]
        for own, theirs in zip(rpn.layers, layers[branch_layer:], strict=False):
            copy_weights(own, theirs)
        head: Any = layers[branch_layer + depth - 1]
        if config.final_norm:
            copy_weights(rpn.norm, backbone.decoder.norm)
        copy_weights(rpn.map_norm, head.input_layernorm)
        copy_weights(rpn.q_proj, head.self_attn.q_proj)
        copy_weights(rpn.k_proj, head.self_attn.k_proj)
        return rpn.to(device=execution_device(head), dtype=backbone.dtype)

    def check_fits(self, backbone: Backbone) -> None:
        """Raise ValueError unless this RPN's sizes are the base model's."""
        wrong = [
            f"{name} {getattr(self.config, name)} (the model has {value})"
            for name, value in backbone.rpn_shape().items()
            if getattr(self.config, name) != value
        ]
        if self.config.branch_layer + self.config.depth > backbone.num_layers:
            reach = f"{self.config.branch_layer} + {self.config.depth} layers"
            wrong.append(f"{reach} (the model has {backbone.num_layers})")
        if wrong:
            base = self.config.base_model or "an unnamed base model"
            raise ValueError(
                f"this RPN was made for {base} and does not fit {backbone.name}: it has "
                + ", ".join(wrong)
            )

    def attach(self, backbone: Backbone, dtype: torch.dtype | None = None) -> RPN:
        """Put the RPN where the backbone's layer B is, with its attention backend.

        dtype: default the backbone's; training keeps float32 weights over a half backbone. Warns
        where the backbone's weights are not those it was trained on, or its images are padded
        otherwise.
        """
        self.check_fits(backbone)
        self._warn_of_padding(backbone)
        self._tell_of_another_base(backbone)
        layer: Any = backbone.layers[self.config.branch_layer][1]
        for own in self.layers:
            attention: Any = own.self_attn
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = backbone.text_config._attn_implementation
        return self.to(device=execution_device(layer), dtype=dtype or backbone.dtype)

    def _warn_of_padding(self, backbone: Backbone) -> None:
        own, found = self.config.padding, backbone.preprocessing.get("padding", "")
        if own and own != found:
            logger.warning(
                "this RPN was trained with padding=%s and %s is loaded with padding=%s: its maps "
                "may be off; load it with padding=%s",
                own,
                backbone.name,
                found,
                own,
            )

    def _tell_of_another_base(self, backbone: Backbone) -> None:
        own = self.config.base_hash
        found = base_hash(backbone, self.config.branch_layer) if own else ""
        if found and found != own:
            logger.warning(
                "this RPN was trained on %s (weights %s) and now reads %s (weights %s): its maps "
                "may be off; train one for this base with `sdrpn train`",
                self.config.base_model or "an unnamed base model",
                own,
                backbone.name,
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
        remove_partial_files(save_directory)
        with atomic_write(save_directory / WEIGHTS_FILE) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        write_json(save_directory / CONFIG_FILE, self.config.to_dict() | {"facts": self.facts})
        # The mixin would keep a card that is already there; a retrained RPN needs its own.
        with atomic_write(save_directory / "README.md") as part:
            self.generate_model_card().save(part)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README of a saved RPN: what it belongs to and how it was trained."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        return ModelCard(
            CARD.format(
                base_model=self.config.base_model or "unknown",
                backbone=self.config.backbone,
                branch=self.config.branch_layer - 1,
                depth=self.config.depth,
                parameters=sum(p.numel() for p in self.parameters()),
                facts=facts or "Not trained: a copy of the backbone's layers.",
            )
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> RPN:
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
    def _from_published(cls, values: Mapping[str, Any], source: Source) -> RPN:
        """An RPN out of a checkpoint as the paper's authors lay it out."""
        config = published.read_config(values, source)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        tensors = published.read_tensors(source, config, shapes)
        check_finite(tensors.items(), source.name)
        return cls._of(config, tensors, {"converted from": source.name})

    @classmethod
    def _of(cls, config: RPNConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> RPN:
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
