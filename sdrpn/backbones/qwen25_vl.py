"""Qwen2.5-VL: prompt, token sequence with M-RoPE positions, and generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from sdrpn.backbones import qwen25_vl_published as published
from sdrpn.backbones.base import Backbone, CropTokens, ImageInput, PromptIds, Segment
from sdrpn.backbones.cache import cache_argument
from sdrpn.backbones.chat_template import ChatPrompt
from sdrpn.backbones.loading import Architecture, load_model
from sdrpn.backbones.qwen25_vl_images import (
    MAX_ASPECT,
    ImageRules,
    check_pixels,
    image_processor,
)
from sdrpn.boxes import ImageGrid, PixelBox
from sdrpn.config import IMAGE_TOKEN, LabelConfig, MapRules, RPNConfig, ZoomConfig
from sdrpn.io.checkpoints import check_layers, execution_device
from sdrpn.io.images import as_shown

SYSTEM_PROMPT = "You are a helpful assistant."


def check_is_qwen25_vl(config: dict[str, Any], name: str) -> None:
    """Check that a model is a Qwen2.5-VL.

    Args:
        config: Its config.json.
        name: Its name in messages.

    Raises:
        ValueError: If it is of another family, or uses sliding windows.
    """
    if config.get("model_type") != Qwen25VL.model_type:
        raise ValueError(
            f"{name} is not a Qwen2.5-VL but has model_type {config.get('model_type')!r}; give "
            f"one such as {ARCHITECTURE.example}"
        )
    text = config | (config.get("text_config") or {})
    check_layers(text, name)
    if text.get("use_sliding_window"):
        raise ValueError(
            f"{name} has use_sliding_window in config.json: prefixes are read with full attention "
            "only; give a Qwen2.5-VL without it"
        )
    check_supported()


def check_supported() -> None:
    """Raise ValueError for versions of transformers whose layers merge the position axes."""
    if not hasattr(modeling.Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies"):
        raise ValueError(
            "Qwen2.5-VL needs transformers 5.20 or newer: pip install -U 'transformers<6'"
        )


ARCHITECTURE = Architecture(
    what="a Qwen2.5-VL",
    example="Qwen/Qwen2.5-VL-7B-Instruct",
    config=Qwen2_5_VLConfig,
    model=Qwen2_5_VLForConditionalGeneration,
    half=torch.bfloat16,
    check=check_is_qwen25_vl,
)


class Qwen25VL(Backbone):
    """A frozen Qwen2.5-VL with its processor and its prompt.

    Args:
        model: A Qwen2_5_VLForConditionalGeneration.
        processor: Its processor, with `tokenizer`, `image_processor` and a chat template.
        min_pixels: Minimum size of a resized image or crop, 784 pixels per token.
        max_pixels: Maximum size of a resized image or crop, in pixels.
        system_prompt: Text of the system turn.
        training: Images and prompts as in labelling and training instead of evaluation: a grey
            square around the image, the text `<image>` before it, a line break after it.
        name: Name of the model in messages.

    Raises:
        ValueError: If the limits are out of order, or transformers is too old.
    """

    model_type = "qwen2_5_vl"
    load_options = frozenset({"min_pixels", "max_pixels", "system_prompt"})
    position_axes = 3
    crop_marks = 2
    default_zoom = ZoomConfig(threshold=published.THRESHOLD)
    label_rules = replace(published.label_rules({}, {}, {}, 0), instead="")
    global_batch = published.GLOBAL_BATCH
    training_overrides = published.TRAINING
    map_rules = MapRules(one_box=True, dark_above=768, min_side=28, max_aspect=MAX_ASPECT)

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        min_pixels: int = published.PIXELS,
        max_pixels: int = published.PIXELS,
        system_prompt: str = SYSTEM_PROMPT,
        training: bool = False,
        name: str = "",
    ) -> None:
        check_supported()
        self.model = model.eval().requires_grad_(False)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.system_prompt, self.training = system_prompt, training
        self.name = name or model.config._name_or_path
        self.text_config = model.config.text_config
        self.context_length = self.text_config.max_position_embeddings
        self.image_token_id: int = model.config.image_token_id
        self.marks: tuple[int, int] = (
            model.config.vision_start_token_id,
            model.config.vision_end_token_id,
        )
        self.image_rules = ImageRules(
            image_processor(processor.image_processor), min_pixels, max_pixels, training
        )
        self.patches_per_token = self.image_rules.merge**2
        self.chat = ChatPrompt(
            processor,
            self.image_token_id,
            system_prompt=system_prompt,
            before_image=IMAGE_TOKEN if training else "",
            before_question="\n" if training else "",
            name=self.name,
        )
        self.head_ids = self.prompt_ids("").before

    @classmethod
    def load(
        cls,
        pretrained: str,
        *,
        min_pixels: int = published.PIXELS,
        max_pixels: int = published.PIXELS,
        system_prompt: str = SYSTEM_PROMPT,
        **load: Any,
    ) -> Qwen25VL:
        """Load a Qwen2.5-VL and its processor from a folder or a Hub id.

        Args:
            pretrained: Folder or Hub id.
            min_pixels: See the class.
            max_pixels: See the class.
            system_prompt: See the class.
            load: Arguments of `loading.load_model`.

        Raises:
            ValueError: See the class and `loading.load_model`.
            WeightsUnavailable: If the model cannot be found or downloaded.
        """
        check_pixels(min_pixels, max_pixels)
        model, processor, _ = load_model(ARCHITECTURE, pretrained, **load)
        return cls(
            model,
            processor,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            system_prompt=system_prompt,
            name=str(pretrained),
        )

    def as_trained(self) -> Qwen25VL:
        return Qwen25VL(
            self.model,
            self.processor,
            system_prompt=self.system_prompt,
            training=True,
            name=self.name,
        )

    # --- prompt ------------------------------------------------------------------------------

    def plain_ids(self, question: str, images: int = 1, answer: str = "") -> list[int]:
        return self.chat.ids(question, images, answer.removeprefix(" "))

    def prompt_ids(self, question: str) -> PromptIds:
        ids = self.plain_ids(question)
        where = ids.index(self.image_token_id)
        return PromptIds(tuple(ids[:where]), tuple(ids[where + 1 :]))

    # --- images ------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> dict[str, Any]:
        rules = self.image_rules
        limits = {"min_pixels": rules.min_pixels, "max_pixels": rules.max_pixels}
        return limits | {"square": rules.square}

    def image_grid(self, image: Image.Image) -> ImageGrid:
        return self.image_rules.grid(as_shown(image).size)

    def preprocess(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        return [self.image_rules.whole(as_shown(image)) for image in images]

    def crop_input(self, image: Image.Image, box: PixelBox) -> ImageInput:
        return self.image_rules.crop(as_shown(image), box)

    def crop_inputs(
        self, image: Image.Image, box: PixelBox, *, tiles: int = 1, max_tokens: int | None = None
    ) -> list[list[ImageInput]]:
        cells = None if max_tokens is None else max_tokens * tiles
        return [[self.image_rules.limited(cells).crop(as_shown(image), box)]]

    def encode(self, inputs: Sequence[ImageInput]) -> list[Float[Tensor, "_ width"]]:
        # One by one, which is faster on a CPU: images do not attend to each other, so that a batch
        # saves no operations. Not measured on a GPU.
        return [self._encode(one) for one in inputs]

    def _encode(self, image: ImageInput) -> Float[Tensor, "cells width"]:
        tower = execution_device(self.model.model.visual)
        patches = torch.tensor([self._patches(image.grid.rows, image.grid.columns)], device=tower)
        features = self.model.get_image_features(image.pixels.to(tower), patches)
        return features.pooler_output[0].to(self.device)

    def _patches(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Number of patches of an image with rows x columns cells: (time, height, width)."""
        return 1, rows * self.image_rules.merge, columns * self.image_rules.merge

    # --- sequence ----------------------------------------------------------------------------

    def prefix_length(self, image_tokens: int) -> int:
        return len(self.head_ids) + image_tokens

    def prefix_segment(self, image: ImageInput, features: Float[Tensor, "cells width"]) -> Segment:
        rows, columns = image.grid.rows, image.grid.columns
        head = self.text_segment(0, self.head_ids)
        start, tokens = head.length, len(features)
        cells = self._cell_positions(start, rows, columns)
        return Segment(
            (*head.ids, *[self.image_token_id] * tokens),
            torch.cat([head.embeds, features]),
            torch.cat([head.positions, cells], dim=-1),
            start + max(rows, columns),
            slice(start, start + tokens),
        )

    def suffix_segment(
        self, start: int, after: Sequence[int], crops: Sequence[CropTokens] = ()
    ) -> Segment:
        suffix = self.text_segment(start, ())
        for crop in crops:
            suffix = suffix.followed_by(self._marked(suffix.next_position, crop))
        return suffix.followed_by(self.text_segment(suffix.next_position, after))

    def _marked(self, start: int, crop: CropTokens) -> Segment:
        """A crop between its own vision marks; dropped tokens leave gaps in the positions."""
        opening = self.text_segment(start, self.marks[:1])
        positions = self._cell_positions(opening.next_position, crop.rows, crop.columns)
        if crop.keep is not None:
            positions = positions[:, crop.keep.to(positions.device)]
        end = opening.next_position + max(crop.rows, crop.columns)
        ids = (self.image_token_id,) * len(crop.tokens)
        cells = Segment(ids, crop.tokens, positions, end)
        return opening.followed_by(cells).followed_by(self.text_segment(end, self.marks[1:]))

    def _cell_positions(self, start: int, rows: int, columns: int) -> Int[Tensor, "3 cells"]:
        """M-RoPE positions of all cells of an image: constant time, row, column."""
        patches = torch.tensor(self._patches(rows, columns))
        return self.model.model.get_vision_position_ids(
            start, patches, 1, self.image_rules.merge, device=self.device
        )

    # --- layers and answers ------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def projector(self) -> nn.Module:
        return self.model.model.visual.merger

    def generate(
        self,
        ids: Int[Tensor, "batch all"],
        embeds: Float[Tensor, "batch all width"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "axes batch new"],
        cache: Cache,
        arguments: Mapping[str, Any],
    ) -> Any:
        # Without position_ids, the model would continue from the offset of an earlier call.
        behind = ids.shape[1] - positions.shape[-1]
        return self.model.generate(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=pad(positions, (behind, 0)),
            **cache_argument(cache),
            **arguments,
        )

    def plain_inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        seen = self.preprocess(images)
        inputs = self.left_padded(rows, [one.grid.cells for one in seen])
        if seen:
            grids = [self._patches(one.grid.rows, one.grid.columns) for one in seen]
            inputs |= {
                "pixel_values": torch.cat([one.pixels for one in seen]).to(self.device, self.dtype),
                "image_grid_thw": torch.tensor(grids, device=self.device),
                "mm_token_type_ids": (inputs["input_ids"] == self.image_token_id).int(),
            }
        return inputs

    # --- the region proposal network ---------------------------------------------------------

    def rpn_shape(self) -> dict[str, Any]:
        return super().rpn_shape() | {"image_tokens": None, **HEAD}

    @classmethod
    def new_decoder_layer(cls, config: RPNConfig, index: int, attention: str) -> nn.Module:
        shape = Qwen2_5_VLTextConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=float(config.rms_norm_eps),  # JSON may write a whole number
            num_hidden_layers=config.depth - 1,
        )
        shape._attn_implementation = attention
        return modeling.Qwen2_5_VLDecoderLayer(shape, index)

    @classmethod
    def new_norm(cls, config: RPNConfig) -> nn.Module:
        return modeling.Qwen2_5_VLRMSNorm(config.hidden_size, float(config.rms_norm_eps))

    @classmethod
    def published_branch(cls, config: Mapping[str, Any]) -> int:
        text = {**config, **(config.get("text_config") or {})}
        hidden, layers = text.get("hidden_size"), text.get("num_hidden_layers")
        if not isinstance(hidden, int) or not isinstance(layers, int):
            return published.SIZES[0].branch_layer  # loading reports what is wrong
        return published.branch_layer(hidden, layers)

    def published_labels(self) -> LabelConfig | None:
        size = published.size_of(self.text_config.hidden_size, self.num_layers)
        return size.labels if size else None


HEAD: Mapping[str, bool] = {"head_bias": True, "rotary_head": True, "final_norm": False}
"""Variant of the map head, in fields of `RPNConfig`."""
