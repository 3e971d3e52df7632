"""The seam between the method and the model families: what every backbone provides.

Everything that differs between families stands behind `Backbone`. No code outside this package asks
which family it is. Shapes: B rows, N new tokens, P cached tokens, C hidden size, A position axes
(1, or 3 for M-RoPE).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sdrpn.backbones.cache import KV, cache_argument
from sdrpn.boxes import ImageGrid, PixelBox
from sdrpn.config import SMALL_SQUARE, LabelConfig, MapRules, RPNConfig, ZoomConfig
from sdrpn.io.checkpoints import execution_device


class PromptIds(NamedTuple):
    """Token ids of a prompt with one image: before the image, and after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ImageInput:
    """An image or a crop, ready for the image encoder.

    Args:
        pixels: What the encoder takes, normalised: [3, height, width], or [patches, values].
        grid: How the tokens lie on the image.
    """

    pixels: Tensor
    grid: ImageGrid


@dataclass(frozen=True)
class CropTokens:
    """The tokens of one crop that are inserted.

    Args:
        tokens: [n, C], those that are kept, row-major.
        rows: Rows of the crop's token grid, before any token was dropped.
        columns: Columns of it.
        keep: [rows * columns] bool, which tokens `tokens` holds; None for all of them.
    """

    tokens: Float[Tensor, "kept width"]
    rows: int
    columns: int
    keep: Bool[Tensor, " all"] | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of one row's sequence.

    Args:
        ids: [n] token ids, the image token's id where an image or a crop stands. They are not
            embedded; they count for repetition penalties.
        embeds: [n, C].
        positions: [A, n].
        next_position: The position of a text token right behind this segment.
        image: Columns of the image tokens, for a segment that holds them.
    """

    ids: tuple[int, ...]
    embeds: Float[Tensor, "tokens width"]
    positions: Int[Tensor, "axes tokens"]
    next_position: int
    image: slice = field(default_factory=lambda: slice(0, 0))

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return len(self.ids)

    def keeping(self, cells: Bool[Tensor, " cells"]) -> Segment:
        """This segment with these of its image tokens only, each at its own position."""
        keep = torch.ones(self.length, dtype=torch.bool, device=self.embeds.device)
        keep[self.image] = cells.to(keep.device)
        kept = [one for one, stays in zip(self.ids, keep.tolist(), strict=True) if stays]
        start = self.image.start
        return Segment(
            tuple(kept),
            self.embeds[keep],
            self.positions[:, keep],
            self.next_position,
            slice(start, start + int(cells.sum())),
        )

    def followed_by(self, other: Segment) -> Segment:
        """This segment and another one, as one."""
        return Segment(
            (*self.ids, *other.ids),
            torch.cat([self.embeds, other.embeds]),
            torch.cat([self.positions, other.positions], dim=-1),
            other.next_position,
            self.image,
        )


@dataclass(frozen=True)
class AttentionInputs:
    """What a decoder layer needs to know of N new tokens behind P cached ones.

    Args:
        mask: What the attention implementation takes for causality and padding.
        rotary: (cos, sin), each [B, N, head_dim].
    """

    mask: Any
    rotary: KV

    def to(self, device: torch.device) -> AttentionInputs:
        """The same on another device."""
        mask = self.mask.to(device) if isinstance(self.mask, Tensor) else self.mask
        cos, sin = self.rotary
        return AttentionInputs(mask, (cos.to(device), sin.to(device)))


class Backbone(ABC):
    """A frozen vision-language model with its tokenizer, image processor and prompt.

    The decoder layers of a family are expected to take `attention_mask`, `position_embeddings` and
    a cache, and to have `input_layernorm` and `self_attn` with `q_proj`,
    `k_proj`, `v_proj` and `head_dim`, as those of LLaMA and Qwen have.
    """

    load_options: ClassVar[frozenset[str]] = frozenset()
    """Arguments of `load` that are the family's own."""

    model_type: ClassVar[str]
    """`model_type` of the family in config.json; what `RPNConfig.backbone` records."""

    @classmethod
    def load(cls, pretrained: str, **options: Any) -> Backbone:
        """Load a model of the family from a folder or a Hub id; see `loading.load_model`."""
        raise NotImplementedError(f"{cls.model_type} models are not loaded from files")

    model: Any
    tokenizer: Any
    text_config: Any
    name: str
    image_token_id: int
    context_length: int

    # --- prompt ------------------------------------------------------------------------------

    @abstractmethod
    def prompt_ids(self, question: str) -> PromptIds:
        """Token ids before and after the image; special tokens in the question are plain text."""

    @abstractmethod
    def plain_ids(self, question: str, images: int, answer: str = "") -> list[int]:
        """Token ids of a prompt with any number of images, one id per image, then `answer`."""

    def as_trained(self) -> Backbone:
        """The same model with pictures and prompts as RPNs are labelled and trained with."""
        return self

    # --- images ------------------------------------------------------------------------------

    map_rules: ClassVar[MapRules] = SMALL_SQUARE
    """How RoI maps become crops, where families differ."""

    default_zoom: ClassVar[ZoomConfig] = ZoomConfig()
    """How to zoom where neither the caller nor the RPN says."""

    crop_marks: ClassVar[int] = 0
    """Tokens that stand around each crop."""

    @abstractmethod
    def image_grid(self, image: Image.Image) -> ImageGrid:
        """How the image tokens lie on this image."""

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        """Prepare whole images for the encoder."""

    @abstractmethod
    def crop_input(self, image: Image.Image, box: PixelBox) -> ImageInput:
        """Cut a box out of an original image and prepare it for the encoder."""

    @abstractmethod
    def encode(self, inputs: Sequence[ImageInput]) -> list[Float[Tensor, "_ width"]]:
        """Run the image encoder and its projector: [rows * columns, C] for each input."""

    @property
    @abstractmethod
    def preprocessing(self) -> Mapping[str, Any]:
        """The settings that decide what `preprocess` makes of an image."""

    # --- sequence ----------------------------------------------------------------------------

    @abstractmethod
    def prefix_length(self, image_tokens: int) -> int:
        """Tokens of the prefix of an image with so many image tokens."""

    @abstractmethod
    def prefix_segment(self, image: ImageInput, features: Float[Tensor, "cells width"]) -> Segment:
        """[text before the image][image tokens]. features: [rows * columns, C]."""

    @abstractmethod
    def suffix_segment(
        self, start: int, after: Sequence[int], crops: Sequence[CropTokens] = ()
    ) -> Segment:
        """[crop tokens][text after the image] behind a prefix that ends at position `start` - 1."""

    def text_segment(self, start: int, ids: Sequence[int]) -> Segment:
        """Plain text from position `start` on."""
        end = start + len(ids)
        positions = torch.arange(start, end, device=self.device).expand(self.position_axes, -1)
        return Segment(tuple(ids), self.embed(ids), positions, end)

    def room(self, image_tokens: int, after: Sequence[int]) -> int:
        """Tokens that the context still holds behind an image and this text; 0 or less: none."""
        return self.context_length - self.prefix_length(image_tokens) - len(after)

    # --- layers ------------------------------------------------------------------------------

    position_axes: ClassVar[int] = 1
    """Axes of a position: 1 for ordinary rotary embeddings, 3 for M-RoPE."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The language model without its head: `layers`, `norm` and `rotary_emb`."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.text_config.num_hidden_layers

    @property
    def layers(self) -> list[tuple[int, nn.Module]]:
        """The decoder layers with their indices."""
        return list(enumerate(self.decoder.layers))

    @property
    def device(self) -> torch.device:
        """Where the word embeddings are, and so where sequences begin."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return self.model.dtype

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """The token that fills finished rows."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else pad

    def embed(self, ids: Sequence[Any] | Tensor) -> Tensor:
        """Word embeddings: ids [...] -> [..., C]."""
        table = self.model.get_input_embeddings()
        return table(torch.as_tensor(ids, device=self.device, dtype=torch.long))

    def attention_inputs(
        self,
        embeds: Float[Tensor, "batch new width"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "axes batch new"],
        cache: Cache | None = None,
    ) -> AttentionInputs:
        """Mask and rotary embeddings of new tokens.

        Args:
            embeds: [B, N, C].
            mask: [B, P + N], 1 where there is a token.
            positions: [A, B, N].
            cache: Holds the P tokens before, or None.
        """
        # Without positions: transformers would take those that jump for several packed sequences.
        causal = create_causal_mask(
            config=self.text_config,
            inputs_embeds=embeds,
            attention_mask=mask,
            **cache_argument(cache),
        )
        if isinstance(causal, Tensor) and causal.dtype == torch.bool:
            # Once, and not in every layer, which torch's fused attention would do.
            shut = torch.finfo(embeds.dtype).min
            causal = torch.zeros_like(causal, dtype=embeds.dtype).masked_fill_(~causal, shut)
        axes = positions if self.position_axes > 1 else positions[0]
        rotary = self.decoder.rotary_emb(embeds, position_ids=axes)
        return AttentionInputs(causal, rotary)

    @staticmethod
    def rotate(
        states: Float[Tensor, "batch heads new head_dim"], rotary: KV
    ) -> Float[Tensor, "batch heads new head_dim"]:
        """Apply rotary embeddings. states: [B, heads, N, head_dim]."""
        cos, sin = (part.to(states.device) for part in rotary)
        return apply_rotary_pos_emb(states, states, cos, sin)[0]

    def logits(self, hidden: Float[Tensor, "*any width"]) -> Float[Tensor, "*any vocabulary"]:
        """Final norm and language-model head: [..., C] -> [..., vocabulary]."""
        return self.model.lm_head(self.decoder.norm(hidden))

    # --- answers -----------------------------------------------------------------------------

    @abstractmethod
    def generate(
        self,
        ids: Int[Tensor, "batch all"],
        embeds: Float[Tensor, "batch all width"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "axes batch new"],
        cache: Cache,
        arguments: Mapping[str, Any],
    ) -> Int[Tensor, "batch longer"]:
        """transformers' generate() behind a filled cache.

        Args:
            ids: [B, P + N] ids of the whole sequence.
            embeds: [B, P + N, C]; what the cache holds is not read.
            mask: [B, P + N].
            positions: [A, B, N] of the tokens behind the cache.
            cache: Keys and values of P tokens of B rows, or of B times the number of beams.
            arguments: Further arguments of generate().

        Returns:
            [B, P + N + new] ids.
        """

    @abstractmethod
    def plain_inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Arguments of the stock model for prompts from `plain_ids`, left-padded."""

    # --- the region proposal network ---------------------------------------------------------

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """What turns image features into image tokens; part of the fingerprint of a base."""

    @abstractmethod
    def rpn_shape(self) -> dict[str, Any]:
        """The fields of an `RPNConfig` that are this model's own."""

    @classmethod
    @abstractmethod
    def new_decoder_layer(cls, config: RPNConfig, index: int, attention: str) -> nn.Module:
        """A decoder layer of the family's own class, for the RPN.

        Args:
            config: Its sizes.
            index: Its place in the RPN's cache, from 0.
            attention: The attention implementation, such as sdpa.
        """

    @classmethod
    @abstractmethod
    def new_norm(cls, config: RPNConfig) -> nn.Module:
        """A norm of the family's own class, over C values."""

    def published_labels(self) -> LabelConfig | None:
        """The published head lists, for models that have some."""
        return None

    label_rules: ClassVar[LabelConfig] = LabelConfig(grounding=(), sink=(), vicrop_layer=0)
    """Where the family's labels draw their lines, with no heads to read."""

    global_batch: ClassVar[int] = 512
    """Questions of a training step, as published."""

    training_overrides: ClassVar[Mapping[str, Any]] = {}
    """Published hyper-parameters that differ from those for LLaVA-1.5."""

    @classmethod
    def published_branch(cls, config: Mapping[str, Any]) -> int:
        """B for a model, from its config.json: as published, or as deep."""
        return 15
