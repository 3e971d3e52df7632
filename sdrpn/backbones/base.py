"""The interface between the method and the model families.

Everything that differs between families is behind `Backbone`; code outside this package does not
depend on the family. Shapes: B rows, N new tokens, P cached tokens, C hidden size, A position axes
(1, or 3 for M-RoPE).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
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
    """Token ids of a prompt with one image: those before the image and those after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ImageInput:
    """A preprocessed image or crop.

    Args:
        pixels: Normalised input of the image encoder: [3, height, width], or [patches, values].
        grid: Mapping from image tokens to pixels of the image or crop.
    """

    pixels: Tensor
    grid: ImageGrid


@dataclass(frozen=True)
class CropTokens:
    """The tokens of one crop that are inserted into the sequence.

    Args:
        tokens: [n, C], row-major, without dropped tokens.
        rows: Rows of the crop's token grid, before tokens are dropped.
        columns: Columns of the crop's token grid, before tokens are dropped.
        keep: [rows * columns] bool, True for the tokens in `tokens`; None if none is dropped.
        encoded: Number of tokens that the image encoder computed for the crop.
    """

    tokens: Float[Tensor, "kept width"]
    rows: int
    columns: int
    keep: Bool[Tensor, " all"] | None = None
    encoded: int = 0


@dataclass(frozen=True)
class Segment:
    """A contiguous part of one sequence.

    Args:
        ids: [n] token ids, with the image token's id for image and crop tokens. They are not
            embedded, but count for repetition penalties.
        embeds: [n, C] input embeddings.
        positions: [A, n] position ids.
        next_position: Position of a text token that follows the segment.
        image: Columns of the image tokens; empty for a segment without an image.
    """

    ids: tuple[int, ...]
    embeds: Float[Tensor, "tokens width"]
    positions: Int[Tensor, "axes tokens"]
    next_position: int
    image: slice = field(default_factory=lambda: slice(0, 0))

    @property
    def length(self) -> int:
        """Number of tokens, n."""
        return len(self.ids)

    def select_image_tokens(self, cells: Bool[Tensor, " cells"]) -> Segment:
        """Drop image tokens; the remaining tokens keep their positions.

        Args:
            cells: [T] bool, True for image tokens to keep.

        Returns:
            The shorter segment.
        """
        keep = torch.ones(self.length, dtype=torch.bool, device=self.embeds.device)
        keep[self.image] = cells.to(keep.device)
        ids = [token for token, kept in zip(self.ids, keep.tolist(), strict=True) if kept]
        start = self.image.start
        return Segment(
            tuple(ids),
            self.embeds[keep],
            self.positions[:, keep],
            self.next_position,
            slice(start, start + int(cells.sum())),
        )

    def followed_by(self, other: Segment) -> Segment:
        """Concatenate this segment and `other`."""
        return Segment(
            (*self.ids, *other.ids),
            torch.cat([self.embeds, other.embeds]),
            torch.cat([self.positions, other.positions], dim=-1),
            other.next_position,
            self.image,
        )


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of a decoder layer besides the hidden states, for N new tokens after P cached tokens.

    Args:
        mask: Causal and padding mask in the format of the attention implementation; None if it
            needs none.
        rotary: (cos, sin), each [B, N, head_dim].
    """

    mask: Any
    rotary: KV

    def to(self, device: torch.device) -> AttentionInputs:
        """Move all tensors to `device`."""
        mask = self.mask.to(device) if isinstance(self.mask, Tensor) else self.mask
        cos, sin = self.rotary
        return AttentionInputs(mask, (cos.to(device), sin.to(device)))

    def last_token(self) -> AttentionInputs:
        """Return the inputs of the last token alone, after all others."""
        # Only a mask of four axes has one row per query: [B, 1, N, P + N].
        queries = isinstance(self.mask, Tensor) and self.mask.ndim == 4
        cos, sin = self.rotary
        mask = self.mask[:, :, -1:] if queries else self.mask
        return AttentionInputs(mask, (cos[:, -1:], sin[:, -1:]))


class Backbone(ABC):
    """A frozen vision-language model with its tokenizer, image processor and prompt.

    Decoder layers must accept `attention_mask`, `position_embeddings` and a cache, and have
    `input_layernorm` and `self_attn` with `q_proj`, `k_proj`, `v_proj` and `head_dim`, as in LLaMA
    and Qwen.
    """

    load_options: ClassVar[frozenset[str]] = frozenset()
    """Arguments of `load` that are the family's own."""

    model_type: ClassVar[str]
    """`model_type` of the family in config.json, recorded in `RPNConfig.backbone`."""

    @classmethod
    def load(cls, pretrained: str, **options: Any) -> Backbone:
        """Load a model of the family.

        Args:
            pretrained: Folder or Hub id.
            options: Arguments of `loading.load_model` and of the family.

        Raises:
            NotImplementedError: If the family has no files to load from.
        """
        raise NotImplementedError(f"{cls.model_type} models cannot be loaded from files")

    model: Any
    tokenizer: Any
    text_config: Any
    name: str
    image_token_id: int
    context_length: int

    # --- prompt ------------------------------------------------------------------------------

    @abstractmethod
    def prompt_ids(self, question: str) -> PromptIds:
        """Tokenize the prompt of one image; special tokens in the question are plain text."""

    @abstractmethod
    def plain_ids(self, question: str, images: int, answer: str = "") -> list[int]:
        """Tokenize a prompt with any number of images.

        Args:
            question: Text of the question; special tokens in it are plain text.
            images: Number of images.
            answer: Text after the prompt.

        Returns:
            Token ids, with one image token id per image.
        """

    def as_trained(self) -> Backbone:
        """Return the model with the preprocessing and prompts of labelling and RPN training."""
        return self

    # --- images ------------------------------------------------------------------------------

    map_rules: ClassVar[MapRules] = SMALL_SQUARE
    """Family-specific post-processing of RoI maps."""

    default_zoom: ClassVar[ZoomConfig] = ZoomConfig()
    """Zoom settings if neither the caller nor the RPN has any."""

    patches_per_token: int = 1
    """Tokens of the image encoder per image token."""

    crop_marks: ClassVar[int] = 0
    """Number of delimiter tokens around each crop."""

    @abstractmethod
    def image_grid(self, image: Image.Image) -> ImageGrid:
        """Return the mapping from image tokens to source pixels."""

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        """Preprocess full images for the encoder."""

    @abstractmethod
    def crop_input(self, image: Image.Image, box: PixelBox) -> ImageInput:
        """Crop an image and preprocess the crop for the encoder.

        Args:
            image: Original image.
            box: Crop, in source pixels.
        """

    def crop_inputs(
        self, image: Image.Image, box: PixelBox, *, tiles: int = 1, max_tokens: int | None = None
    ) -> list[list[ImageInput]]:
        """Crop an image for a number of tokens and preprocess the crop for the encoder.

        Args:
            image: Original image.
            box: Crop, in source pixels.
            tiles: Factor by which the crop may have more tokens than a single crop, for sparse
                crops. Families with one input size cut the crop into up to so many tiles.
            max_tokens: Number of tokens to keep of the crop; None: no limit.

        Returns:
            Rows of tiles; neighbouring tiles in a row have the same number of token rows, and tiles
            in a column the same number of token columns.
        """
        del tiles, max_tokens  # families with one input size cannot encode smaller crops
        return [[self.crop_input(image, box)]]

    @abstractmethod
    def encode(self, inputs: Sequence[ImageInput]) -> list[Float[Tensor, "_ width"]]:
        """Run the image encoder and its projector.

        Returns:
            [rows * columns, C] for each input.
        """

    @property
    @abstractmethod
    def preprocessing(self) -> Mapping[str, Any]:
        """Settings that determine the output of `preprocess`; part of the prefix cache key."""

    # --- sequence ----------------------------------------------------------------------------

    @abstractmethod
    def prefix_length(self, image_tokens: int) -> int:
        """Return the number of prefix tokens for an image with `image_tokens` tokens."""

    @abstractmethod
    def prefix_segment(self, image: ImageInput, features: Float[Tensor, "cells width"]) -> Segment:
        """Build the prefix: [text before the image][image tokens].

        Args:
            image: The preprocessed image.
            features: [rows * columns, C] from `encode`.
        """

    @abstractmethod
    def suffix_segment(
        self, start: int, after: Sequence[int], crops: Sequence[CropTokens] = ()
    ) -> Segment:
        """Build the sequence after a prefix: [crop tokens][text after the image].

        Args:
            start: First position, the prefix's `next_position`.
            after: Token ids after the image.
            crops: Crops to insert.
        """

    def text_segment(self, start: int, ids: Sequence[int]) -> Segment:
        """Build a segment of text tokens.

        Args:
            start: First position.
            ids: Token ids.
        """
        end = start + len(ids)
        positions = torch.arange(start, end, device=self.device).expand(self.position_axes, -1)
        return Segment(tuple(ids), self.embed(ids), positions, end)

    def remaining_tokens(self, image_tokens: int, after: Sequence[int]) -> int:
        """Return the context length minus the prompt length; negative if the prompt is too long.

        Args:
            image_tokens: Number of image tokens.
            after: Token ids after the image.
        """
        return self.context_length - self.prefix_length(image_tokens) - len(after)

    # --- layers ------------------------------------------------------------------------------

    position_axes: ClassVar[int] = 1
    """Number of position axes: 1 for standard rotary embeddings, 3 for M-RoPE."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The language model without its head: `layers`, `norm` and `rotary_emb`."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.text_config.num_hidden_layers

    @property
    def layers(self) -> list[tuple[int, nn.Module]]:
        """(index, decoder layer) pairs."""
        return list(enumerate(self.decoder.layers))

    @property
    def device(self) -> torch.device:
        """Device of the word embeddings, where sequences are built."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.model.dtype

    @property
    def eos_token_id(self) -> int:
        """End-of-sequence token id."""
        return self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Padding token id; the end-of-sequence token if the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else pad

    def embed(self, ids: Sequence[Any] | Tensor) -> Tensor:
        """Look up word embeddings: [...] -> [..., C]."""
        table = self.model.get_input_embeddings()
        return table(torch.as_tensor(ids, device=self.device, dtype=torch.long))

    def attention_inputs(
        self,
        embeds: Float[Tensor, "batch new width"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "axes batch new"],
        cache: Cache | None = None,
    ) -> AttentionInputs:
        """Compute the attention mask and rotary embeddings of new tokens.

        Args:
            embeds: [B, N, C] input embeddings.
            mask: [B, P + N], 1 for tokens, 0 for padding.
            positions: [A, B, N] position ids.
            cache: KV cache of the P previous tokens, or None if P is 0.
        """
        causal = self.attention_mask(embeds, mask, cache)
        axes = positions if self.position_axes > 1 else positions[0]
        rotary = self.decoder.rotary_emb(embeds, position_ids=axes)
        return AttentionInputs(causal, rotary)

    def attention_mask(
        self,
        embeds: Float[Tensor, "batch new width"],
        mask: Int[Tensor, "batch all"],
        cache: Cache | None = None,
    ) -> Any:
        """Compute the attention mask of new tokens, see `AttentionInputs.mask`.

        Args:
            embeds: [B, N, C], for its shape, device and data type.
            mask: [B, P + N], 1 for tokens, 0 for padding.
            cache: KV cache of the P previous tokens, or None if P is 0.
        """
        # No positions: transformers would read gaps in them as boundaries of packed sequences.
        causal = create_causal_mask(
            config=self.text_config,
            inputs_embeds=embeds,
            attention_mask=mask,
            **cache_argument(cache),
        )
        if isinstance(causal, Tensor) and causal.dtype == torch.bool:
            # Convert once here; torch's fused attention would convert it in every layer.
            lowest = torch.finfo(embeds.dtype).min
            causal = torch.zeros_like(causal, dtype=embeds.dtype).masked_fill_(~causal, lowest)
        return causal

    @staticmethod
    def rotate(
        states: Float[Tensor, "batch heads new head_dim"], rotary: KV
    ) -> Float[Tensor, "batch heads new head_dim"]:
        """Apply rotary embeddings.

        Args:
            states: [B, heads, N, head_dim] queries or keys.
            rotary: (cos, sin), each [B, N, head_dim].

        Returns:
            [B, heads, N, head_dim].
        """
        cos, sin = (part.to(states.device) for part in rotary)
        return apply_rotary_pos_emb(states, states, cos, sin)[0]

    def logits(self, hidden: Float[Tensor, "*any width"]) -> Float[Tensor, "*any vocabulary"]:
        """Apply the final norm and the language-model head: [..., C] -> [..., vocabulary]."""
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
    ) -> Any:
        """Run transformers' generate() over a filled KV cache.

        Args:
            ids: [B, P + N] token ids of the full sequence.
            embeds: [B, P + N, C] input embeddings; the first P columns are not read.
            mask: [B, P + N], 1 for tokens, 0 for padding.
            positions: [A, B, N] position ids of the tokens after the cache.
            cache: Keys and values of P tokens, with B rows, or B times `num_beams` rows.
            arguments: Further arguments of generate().

        Returns:
            [B, P + N + new] token ids, or a ModelOutput with `return_dict_in_generate`.
        """

    @abstractmethod
    def plain_inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Build the stock model's inputs, left-padded.

        Args:
            rows: Token ids from `plain_ids`, one image token id per image.
            images: Images of all rows, in order.

        Returns:
            Keyword arguments of the model's forward and generate().
        """

    def left_padded(
        self, rows: Sequence[Sequence[int]], image_tokens: Iterable[int]
    ) -> dict[str, Tensor]:
        """Token ids with one image token per cell, left-padded, and their mask.

        Args:
            rows: Prompts from `plain_ids`.
            image_tokens: Number of tokens of each image, over all rows in order.

        Returns:
            `input_ids` and `attention_mask`, both [B, longest].
        """
        counts = iter(image_tokens)
        expanded = [
            [t for i in ids for t in [i] * (next(counts) if i == self.image_token_id else 1)]
            for ids in rows
        ]
        longest = max(map(len, expanded))
        ids = torch.full((len(rows), longest), self.pad_token_id, device=self.device)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(expanded):
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    # --- the region proposal network ---------------------------------------------------------

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """Projector from image features to image tokens; part of a base model's fingerprint."""

    def rpn_shape(self) -> dict[str, Any]:
        """Return the `RPNConfig` fields that the model determines."""
        names = (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        )
        sizes = {name: getattr(self.text_config, name) for name in names}
        return {"backbone": self.model_type, **sizes}

    @classmethod
    @abstractmethod
    def new_decoder_layer(cls, config: RPNConfig, index: int, attention: str) -> nn.Module:
        """Create a decoder layer of the family's class, for the RPN.

        Args:
            config: Sizes of the layer.
            index: Index of the layer in the RPN's KV cache, from 0.
            attention: Attention implementation, such as sdpa.
        """

    @classmethod
    @abstractmethod
    def new_norm(cls, config: RPNConfig) -> nn.Module:
        """Create a norm of the family's class, over C features."""

    def published_labels(self) -> LabelConfig | None:
        """Return the published head lists; None if there are none for this model."""
        return None

    label_rules: ClassVar[LabelConfig] = LabelConfig(grounding=(), sink=(), vicrop_layer=0)
    """Pseudo-label thresholds of the family, without head lists."""

    global_batch: ClassVar[int] = 512
    """Published global batch size, in questions."""

    training_overrides: ClassVar[Mapping[str, Any]] = {}
    """Published hyperparameters that differ from those for LLaVA-1.5."""

    @classmethod
    def published_branch(cls, config: Mapping[str, Any]) -> int:
        """Return the branch layer B: the published one, or one at a similar relative depth.

        Args:
            config: Values of the model's config.json.
        """
        return 15
