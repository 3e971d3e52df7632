"""LLaVA-1.5: a LLaMA language model and a CLIP tower that sees images as 336 x 336 pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, repeat
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
)
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from sdrpn.backbones.base import Backbone, CropTokens, ImageInput, PromptIds, Segment
from sdrpn.backbones.cache import cache_argument
from sdrpn.backbones.loading import Architecture, load_model
from sdrpn.backbones.plain_text import PlainText
from sdrpn.boxes import ImageGrid, PixelBox
from sdrpn.config import (
    ASPECT_RATIO,
    IMAGE_TOKEN,
    NOTED_PADDINGS,
    PADDINGS,
    VICUNA_SYSTEM_PROMPT,
    LabelConfig,
    RPNConfig,
    published_labels,
)
from sdrpn.io.checkpoints import check_layers, execution_device
from sdrpn.io.images import LONGEST, as_shown, limit_size


def check_is_llava15(config: dict[str, Any], name: str) -> None:
    """Check that a model is a LLaVA-1.5 in the Hugging Face layout.

    Args:
        config: Values of its config.json.
        name: Model, for messages.

    Raises:
        ValueError: If it is another model or layout; names it.
    """
    check_not_llava16(config, name)
    kind = config.get("model_type", "a model without a model_type")
    if kind in ("llava_llama", "llava"):
        check_layers(config, name)
        text = (config.get("text_config") or {}).get("model_type", "llama")
        vision = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
        if kind == "llava_llama" or "mm_vision_tower" in config:
            raise ValueError(
                f"{name} is in the original LLaVA layout (model_type {kind!r}); convert it once "
                f"with `sdrpn convert base {name} --out FOLDER`, or use one in the Hugging Face "
                "layout, such as llava-hf/llava-1.5-7b-hf"
            )
        if (text, vision) == ("llama", "clip_vision_model"):
            strategy = config.get("vision_feature_select_strategy", "default")
            layer = config.get("vision_feature_layer", -2)
            if strategy == "default" and isinstance(layer, int):
                return
            kind = f"llava with image features {strategy!r} of layer {layer}"
        else:
            kind = f"llava with a {text} language model and a {vision} vision tower"
    raise ValueError(
        f"{name} is not a LLaVA-1.5 model but {kind}; sdrpn needs a LLaMA language model and a "
        "CLIP tower with one feature layer and no CLS token, such as llava-hf/llava-1.5-7b-hf"
    )


def check_not_llava16(config: Mapping[str, Any], name: str) -> None:
    """Check that a model is not a LLaVA-1.6 (LLaVA-NeXT), which splits images into tiles.

    Args:
        config: Values of its config.json.
        name: Model, for the message.

    Raises:
        ValueError: If it is a LLaVA-1.6.
    """
    kind, ratio = config.get("model_type"), config.get(ASPECT_RATIO)
    signs = {
        "model_type": kind if kind == "llava_mistral" else None,
        ASPECT_RATIO: ratio if isinstance(ratio, str) and ratio.startswith("anyres") else None,
        "mm_patch_merge_type": config.get("mm_patch_merge_type"),
    }
    found = {key: sign for key, sign in signs.items() if sign not in (None, "flat")}
    if found:
        key, sign = next(iter(found.items()))
        raise ValueError(
            f"{name} is not a LLaVA-1.5 model but a LLaVA-1.6 ({key} is {sign!r} in config.json), "
            "which reads an image in tiles; use a LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf or "
            "liuhaotian/llava-v1.5-7b"
        )


def noted_padding(config: Mapping[str, Any], name: str) -> str:
    """Read the padding mode of a model from its config.json.

    Args:
        config: Values of config.json.
        name: Model, for the message.

    Returns:
        `pad` or `crop`; `pad` if config.json has no `image_aspect_ratio`.

    Raises:
        ValueError: If the value is unknown.
    """
    ratio = config.get(ASPECT_RATIO)
    if ratio is None:
        return "pad"
    if not isinstance(ratio, str) or ratio not in NOTED_PADDINGS:
        raise ValueError(
            f"{name}: {ASPECT_RATIO} in config.json must be {' or '.join(NOTED_PADDINGS)}, got "
            f"{ratio!r:.80}; set it to the value used in training"
        )
    return NOTED_PADDINGS[ratio]


ARCHITECTURE = Architecture(
    what="a LLaVA-1.5",
    example="llava-hf/llava-1.5-7b-hf",
    config=LlavaConfig,
    model=LlavaForConditionalGeneration,
    half=torch.float16,
    check=check_is_llava15,
)


def check_padding(padding: str | None) -> None:
    """Raise ValueError for an unknown padding mode; None stands for the model's default."""
    if padding is not None and padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")


def square_grid(size: tuple[int, int], cells: int, side: int, padding: str = "pad") -> ImageGrid:
    """Map a square grid of image tokens to the pixels of an image.

    Args:
        size: (width, height) of the image, in pixels.
        cells: Image tokens per side.
        side: Side of the encoder's square input, in pixels.
        padding: `pad` centres the full image on the square, `crop` takes its central square.
    """
    fitted = max(size) if padding == "pad" else min(size)
    ratio = side / fitted
    # A padded image is resized to an integer size, so the size is truncated before centring, as in
    # SD-RPN's published code. `crop` has no published rule and keeps the exact offset.
    width, height = (int(n * ratio) if padding == "pad" else n * ratio for n in size)
    offset = (side - width) / 2, (side - height) / 2
    exact = Fraction(side, fitted)
    return ImageGrid(cells, cells, size, Fraction(side, cells), (exact, exact), offset)


class Llava15(Backbone):
    """A frozen LLaVA-1.5 with its processor and prompt.

    Args:
        model: The model.
        processor: A LlavaProcessor, or an object with its `tokenizer` and `image_processor`.
        padding: `pad` pads the full image to a square, as in LLaVA-1.5's training and evaluation;
            `crop` uses the checkpoint's image processor without padding, which crops the centre.
            Default: `image_aspect_ratio` in config.json (`pad`, or `square` for `crop`), else
            `pad`.
        system_prompt: Sentence before the conversation.
        name: Name for messages and RPN configs; default: the folder or Hub id.
    """

    model_type = "llava"
    load_options = frozenset({"padding", "system_prompt"})

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: Any,
        *,
        padding: str | None = None,
        system_prompt: str = VICUNA_SYSTEM_PROMPT,
        name: str = "",
    ) -> None:
        check_padding(padding)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.tokenizer = self.processor.tokenizer
        self.system_prompt = system_prompt
        self.name = name or model.config._name_or_path
        noted = {ASPECT_RATIO: getattr(model.config, ASPECT_RATIO, None)}
        self.padding: str = padding or noted_padding(noted, self.name)
        vision: Any = model.config.vision_config
        self.side: int = vision.image_size
        self.grid: int = vision.image_size // vision.patch_size
        self.image_tokens = self.grid**2
        self.text_config = model.config.text_config
        self.context_length = self.text_config.max_position_embeddings
        self.image_token_id: int = model.config.image_token_id
        own = self.processor.image_processor
        square = {"height": self.side, "width": self.side}
        self._padder: Any = LlavaImageProcessorPil(
            do_pad=True,
            size=square,
            crop_size=square,
            image_mean=own.image_mean,
            image_std=own.image_std,
        )
        self.plain_text = PlainText(self.tokenizer, self.image_token_id, self.name)
        self.head_ids = self.prompt_ids("").before

    @classmethod
    def load(
        cls,
        pretrained: str,
        *,
        padding: str | None = None,
        system_prompt: str = VICUNA_SYSTEM_PROMPT,
        **load: Any,
    ) -> Llava15:
        """Load a LLaVA-1.5 and its processor.

        Args:
            pretrained: Folder or Hub id.
            padding: See the class.
            system_prompt: Sentence before the conversation.
            load: Arguments of `loading.load_model`.

        Raises:
            ValueError: If the model is not a LLaVA-1.5, or a file is broken.
            WeightsUnavailable: If the model cannot be found or downloaded.
        """
        check_padding(padding)

        def check(config: dict[str, Any], name: str) -> None:
            check_is_llava15(config, name)
            _ = padding or noted_padding(config, name)

        kind = replace(ARCHITECTURE, check=check)
        model, processor, config = load_model(kind, pretrained, **load)
        return cls(
            model,
            processor,
            padding=padding or noted_padding(config, pretrained),
            system_prompt=system_prompt,
            name=str(pretrained),
        )

    # --- prompt ------------------------------------------------------------------------------

    def prompt(self, question: str, images: int = 1, mark: str = IMAGE_TOKEN) -> str:
        """Build a Vicuna prompt.

        If the question contains `<image>` exactly `images` times, these are placeholders: several
        stay in place, a single one moves to the front. Otherwise they are plain text, and all
        images precede the question.

        Args:
            question: Text of the question.
            images: Number of images.
            mark: Text that stands for an image in the prompt.
        """
        placeholders = question.count(IMAGE_TOKEN)
        if images > 1 and placeholders == images:
            question = question.replace(IMAGE_TOKEN, mark)
        elif images:
            if placeholders == images:
                # In LLaVA-1.5's training data, a single image always comes first.
                question = question.replace(IMAGE_TOKEN, "").strip()
            question = " ".join([mark] * images) + "\n" + question
        system = f"{self.system_prompt} " if self.system_prompt else ""
        return f"{system}USER: {question} ASSISTANT:"

    def plain_ids(self, question: str, images: int = 1, answer: str = "") -> list[int]:
        prompt = self.prompt(question, images, self.plain_text.mark)
        return self.plain_text.ids(prompt + answer)

    def prompt_ids(self, question: str) -> PromptIds:
        ids = self.plain_ids(question)
        where = ids.index(self.image_token_id)
        return PromptIds(tuple(ids[:where]), tuple(ids[where + 1 :]))

    # --- images ------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"side": self.side, "padding": self.padding}

    def image_grid(self, image: Image.Image) -> ImageGrid:
        return square_grid(as_shown(image).size, self.grid, self.side, self.padding)

    def preprocess(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        grids = [self.image_grid(image) for image in images]
        return [ImageInput(*pair) for pair in zip(self.pixels(images), grids, strict=True)]

    def pixels(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 side side"]:
        """Preprocess full images.

        Returns:
            [n, 3, side, side], normalised.
        """
        own = self.processor.image_processor
        processor = self._padder if self.padding == "pad" else own
        limited = [limit_size(as_shown(image), self.padding) for image in images]
        inputs = processor(images=limited, do_pad=self.padding == "pad", return_tensors="pt")
        return inputs["pixel_values"]

    def crop_input(self, image: Image.Image, box: PixelBox) -> ImageInput:
        crop = crop_to_square(as_shown(image), box, self.side)
        inputs = self._padder(images=[crop], do_pad=False, do_resize=False, return_tensors="pt")
        size = box.x1 - box.x0, box.y1 - box.y0
        scale = self.side / size[0], self.side / size[1]
        grid = ImageGrid(self.grid, self.grid, size, self.side / self.grid, scale)
        return ImageInput(inputs["pixel_values"][0], grid)

    def crop_inputs(
        self, image: Image.Image, box: PixelBox, *, tiles: int = 1, max_tokens: int | None = None
    ) -> list[list[ImageInput]]:
        rows, columns = tiling(box, tiles, self.side)
        xs = [box.x0 + (box.x1 - box.x0) * i // columns for i in range(columns + 1)]
        ys = [box.y0 + (box.y1 - box.y0) * i // rows for i in range(rows + 1)]
        return [
            [self.crop_input(image, PixelBox(x0, y0, x1, y1)) for x0, x1 in pairwise(xs)]
            for y0, y1 in pairwise(ys)
        ]

    def encode(self, inputs: Sequence[ImageInput]) -> list[Float[Tensor, "cells width"]]:
        tower = execution_device(self.model.model.vision_tower)
        pixels = torch.stack([one.pixels for one in inputs])
        pixels = pixels.to(device=tower, dtype=self.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return [one.to(self.device) for one in features]

    # --- sequence ----------------------------------------------------------------------------

    def prefix_length(self, image_tokens: int) -> int:
        return len(self.head_ids) + image_tokens

    def prefix_segment(self, image: ImageInput, features: Float[Tensor, "cells width"]) -> Segment:
        start, tokens = len(self.head_ids), len(features)
        ids = (*self.head_ids, *[self.image_token_id] * tokens)
        embeds = torch.cat([self.embed(self.head_ids), features])
        positions = torch.arange(len(ids), device=embeds.device)[None]
        return Segment(ids, embeds, positions, len(ids), slice(start, start + tokens))

    def suffix_segment(
        self, start: int, after: Sequence[int], crops: Sequence[CropTokens] = ()
    ) -> Segment:
        tokens = [crop.tokens for crop in crops]
        embeds = torch.cat([*tokens, self.embed(after)]) if tokens else self.embed(after)
        ids = (*[self.image_token_id] * (len(embeds) - len(after)), *after)
        end = start + len(ids)
        positions = torch.arange(start, end, device=embeds.device)[None]
        return Segment(ids, embeds, positions, end)

    # --- layers and answers ------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def generate(
        self,
        ids: Int[Tensor, "batch all"],
        embeds: Float[Tensor, "batch all width"],
        mask: Int[Tensor, "batch all"],
        positions: Int[Tensor, "axes batch new"],
        cache: Cache,
        arguments: Mapping[str, Any],
    ) -> Any:
        # generate() derives the same positions from the mask.
        return self.model.generate(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            **cache_argument(cache),
            **arguments,
        )

    def plain_inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        inputs = self.left_padded(rows, repeat(self.image_tokens))
        if images:
            inputs["pixel_values"] = self.pixels(images).to(self.device, self.dtype)
        return inputs

    # --- the region proposal network ---------------------------------------------------------

    def rpn_shape(self) -> dict[str, Any]:
        return super().rpn_shape() | {"image_tokens": self.image_tokens}

    @classmethod
    def new_decoder_layer(cls, config: RPNConfig, index: int, attention: str) -> nn.Module:
        shape = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=float(config.rms_norm_eps),  # may be an integer in JSON
            num_hidden_layers=config.depth - 1,
        )
        shape._attn_implementation = attention
        return LlamaDecoderLayer(shape, index)

    @classmethod
    def new_norm(cls, config: RPNConfig) -> nn.Module:
        return LlamaRMSNorm(config.hidden_size, float(config.rms_norm_eps))

    def published_labels(self) -> LabelConfig | None:
        return published_labels(self.text_config.num_hidden_layers, self.text_config.hidden_size)


def tiling(box: PixelBox, tiles: int, side: int) -> tuple[int, int]:
    """Choose how many tiles a crop is cut into.

    No tile has a side under half the encoder's input on a cut axis, so that small crops stay whole.

    Args:
        box: Crop, in source pixels.
        tiles: Maximum number of tiles.
        side: Side of the encoder's square input, in pixels.

    Returns:
        (rows, columns): as many tiles as possible, as square as possible.
    """
    width, height = box.x1 - box.x0, box.y1 - box.y0
    best = max(
        (rows * columns, -abs(math.log((height / rows) / (width / columns))), rows, columns)
        for rows in range(1, tiles + 1)
        for columns in range(1, tiles // rows + 1)
        if rows <= math.ceil(height / side) and columns <= math.ceil(width / side)
    )
    return best[2], best[3]


def crop_to_square(image: Image.Image, box: PixelBox, side: int) -> Image.Image:
    """Crop an image and resize the crop to a square, bilinear (SD-RPN, section 3.3).

    Args:
        image: Original image.
        box: Crop, in source pixels.
        side: Side of the square, in pixels.
    """
    # Resize width before height, as the Pillow versions behind the published numbers did. Newer
    # versions start with the cheaper direction, which changes the rounding of tall crops.
    bilinear = Image.Resampling.BILINEAR
    crop = image.crop((box.x0, box.y0, box.x1, box.y1))
    if crop.height > LONGEST:
        # Width first would need gigabytes for a tall and narrow crop.
        crop = crop.resize((crop.width, side), bilinear)
    return crop.resize((side, crop.height), bilinear).resize((side, side), bilinear)
