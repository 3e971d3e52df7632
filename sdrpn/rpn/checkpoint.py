"""RPN checkpoints: initialisation from a backbone, saving, loading, the authors' layouts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sdrpn.backbones.base import Backbone
from sdrpn.backbones.fingerprint import base_hash
from sdrpn.config import LabelConfig, RPNConfig, ZoomConfig
from sdrpn.io.atomic import atomic_write, remove_partial_files, write_json
from sdrpn.io.checkpoint_files import Source, read_all
from sdrpn.io.checkpoints import check_finite, copy_weights, execution_device
from sdrpn.io.model_card import new_card, save_card
from sdrpn.rpn import published
from sdrpn.rpn.model import RegionProposalNetwork

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "rpn.safetensors"
CONFIG_FILE = "config.json"
WHAT = "an RPN checkpoint"

CARD = """# Region proposal network for {base_model}

Predicts which regions of an image the model should look at again (SD-RPN, arXiv 2509.16944). It
takes the output of the backbone's layer {branch} and has {parameters:,} parameters ({depth}
layers).

```python
from sdrpn import ZoomModel
zoom = ZoomModel.from_pretrained("{base_model}", rpn="path-or-id-of-this-folder")
```

## Training facts

{facts}
"""


class RPN(RegionProposalNetwork, ModelHubMixin):
    """A region proposal network with methods to initialise, save, load and publish it.

    Args:
        config: Sizes and variant of the head.
        attention: Attention implementation of the decoder layers, such as sdpa.

    Attributes:
        facts: Training facts for the model card.
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
        """Create an RPN with weights copied from the backbone (docs/method.md).

        Args:
            backbone: The base model.
            branch_layer: B, the index of the first backbone layer to copy.
            depth: R, the number of layers, the map head included.
            zoom: Zoom settings, saved in the RPN's config; default: the family's.
            labels: Head lists, saved in the RPN's config.

        Raises:
            ValueError: If the backbone has fewer than B + R layers.
        """
        if branch_layer + depth > backbone.num_layers:
            raise ValueError(
                f"branch_layer {branch_layer} + depth {depth} must be at most the backbone's "
                f"{backbone.num_layers} layers"
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

    def with_gate(self, weight: Float[Tensor, " width"], bias: float) -> RPN:
        """Return this RPN with a learned gate (`ZoomConfig.learned_gate`).

        Args:
            weight: [C] weights of the gate.
            bias: Its bias.

        Returns:
            A frozen RPN that shares all other weights.
        """
        with torch.device("meta"):
            rpn = RPN(dataclasses.replace(self.config, gate=True))
        gate = {"gate.weight": weight[None].float(), "gate.bias": torch.tensor([float(bias)])}
        own = {name: tensor.to(self.device) for name, tensor in gate.items()}
        rpn.load_state_dict(self.state_dict() | own, assign=True)
        rpn.facts = dict(self.facts)
        return rpn.eval().requires_grad_(False)

    def check_fits(self, backbone: Backbone) -> None:
        """Check that the RPN's sizes are the base model's.

        Raises:
            ValueError: If they differ; names all differences.
        """
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
        """Move the RPN to the device of backbone layer B and use its attention implementation.

        Logs a warning if the RPN was trained with other backbone weights or another padding.

        Args:
            backbone: The base model.
            dtype: Data type of the RPN; default: the backbone's. Training uses float32.

        Returns:
            The RPN itself.

        Raises:
            ValueError: If the RPN does not fit the backbone.
        """
        self.check_fits(backbone)
        self._warn_about_padding(backbone)
        self._warn_about_base(backbone)
        layer: Any = backbone.layers[self.config.branch_layer][1]
        for own in self.layers:
            attention: Any = own.self_attn
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = backbone.text_config._attn_implementation
        return self.to(device=execution_device(layer), dtype=dtype or backbone.dtype)

    def _warn_about_padding(self, backbone: Backbone) -> None:
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

    def _warn_about_base(self, backbone: Backbone) -> None:
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
        """Save the RPN to a folder for `from_pretrained`.

        Args:
            save_directory: The folder.
            options: Arguments of `ModelHubMixin.save_pretrained`.

        Raises:
            ValueError: If a weight is not finite; nothing is written.
        """
        hint = "training diverged: use a lower learning rate"
        check_finite(self.state_dict().items(), f"the RPN for {save_directory}", hint)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        remove_partial_files(save_directory)
        with atomic_write(save_directory / WEIGHTS_FILE) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        write_json(save_directory / CONFIG_FILE, self.config.to_dict() | {"facts": self.facts})
        # The mixin would keep the existing card of a retrained RPN.
        save_card(self.generate_model_card(), save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Build the model card from the config and the training facts."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        base = self.config.base_model or "unknown"
        tags = ["sd-rpn", "region-proposal", self.config.backbone]
        return new_card(
            ModelCardData(library_name="sdrpn", tags=tags, base_model=base),
            CARD.format(
                base_model=base,
                branch=self.config.branch_layer - 1,
                depth=self.config.depth,
                parameters=sum(p.numel() for p in self.parameters()),
                facts=facts or "Not trained: a copy of the backbone's layers.",
            ),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> RPN:
        """Load an RPN saved by `save_pretrained`, or published by the paper's authors.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            download: Arguments of `hf_hub_download`, such as `revision`, `cache_dir` and `token`.

        Raises:
            FileNotFoundError: If a file is missing.
            OSError: If the Hub cannot be reached or denies access.
            ValueError: If the config is invalid, or tensors do not fit it.
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
            rpn = cls._from_tensors(config, tensors, facts)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch's, for sizes too
            detail = " ".join(str(error).split())[:500]
            raise ValueError(f"{source.name}: weights and config disagree: {detail}") from error
        check_finite(tensors.items(), source.name)
        return rpn

    @classmethod
    def _from_published(cls, values: Mapping[str, Any], source: Source) -> RPN:
        """Load a checkpoint in a layout of the paper's authors."""
        config = published.read_config(values, source)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        tensors = published.read_tensors(source, config, shapes)
        check_finite(tensors.items(), source.name)
        return cls._from_tensors(config, tensors, {"converted from": source.name})

    @classmethod
    def _from_tensors(
        cls, config: RPNConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> RPN:
        """Create a frozen RPN with the given weights, in their widest data type."""
        # Every layer has several tensors. Check before building that many layers.
        if config.depth > len(tensors):
            raise RuntimeError(f"{len(tensors)} tensors are too few for {config.depth} layers")
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors.values()})
        with torch.device("meta"):
            rpn = cls(config)
        rpn.load_state_dict({k: t.to(dtype) for k, t in tensors.items()}, assign=True)
        rpn.facts = facts
        return rpn.eval().requires_grad_(False)
