"""A backbone of another shape than any real one, to show that nothing outside it is assumed.

Its grid is not square and depends on the image (3 x 5 cells for wide images, 4 x 3 for others), so
prefixes differ in length. Its query, key and value projections have biases. Its positions are not
consecutive: the cells of a row share one, and dropped crop tokens leave gaps. Its RPN has a rotary
head with biases and no final norm. The image encoder is one matrix per cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from sdrpn.backbones import registry
from sdrpn.backbones.base import Backbone, CropTokens, ImageInput, PromptIds, Segment
from sdrpn.backbones.cache import cache_argument
from sdrpn.boxes import ImageGrid, PixelBox
from sdrpn.config import RPNConfig
from tools.tiny_vstar.tiny_model import build_tokenizer

CELL = 8
WIDTH, LAYERS, HEADS, GROUPS = 64, 6, 4, 2
SEED = 5


class Double(Backbone):
    """See the module. Prompt: [<s> USER :] image [question ASSISTANT :]."""

    model_type = "double"

    def __init__(self, seed: int = SEED) -> None:
        self.tokenizer = build_tokenizer()
        self.text_config = Qwen2Config(
            vocab_size=len(self.tokenizer),
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            max_position_embeddings=512,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.context_length = self.text_config.max_position_embeddings
        self.model = Qwen2ForCausalLM(self.text_config).eval().requires_grad_(False)
        self.tower = nn.Linear(3 * CELL * CELL, WIDTH).requires_grad_(False)
        self.name = "double"
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<image>")
        rng = np.random.default_rng(seed)
        for name, weight in [*self.model.named_parameters(), *self.tower.named_parameters()]:
            noise = torch.from_numpy(rng.standard_normal(weight.shape, dtype=np.float32))
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.12 * noise)
        self.tower.weight.mul_(4)

    # --- prompt ------------------------------------------------------------------------------

    def prompt_ids(self, question: str) -> PromptIds:
        before = self.tokenizer("USER :")["input_ids"]
        after = self.tokenizer(f"{question} ASSISTANT :", add_special_tokens=False)["input_ids"]
        return PromptIds(tuple(before), tuple(after))

    def plain_ids(self, question: str, images: int, answer: str = "") -> list[int]:
        before, after = self.prompt_ids(question)
        more = self.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
        return [*before, *[self.image_token_id] * images, *after, *more]

    # --- images ------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        return {"cell": CELL}

    def image_grid(self, image: Image.Image) -> ImageGrid:
        rows, columns = (3, 5) if image.width > image.height else (4, 3)
        scale = columns * CELL / image.width, rows * CELL / image.height
        return ImageGrid(rows, columns, image.size, CELL, scale)

    def preprocess(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        return [self._ready(image) for image in images]

    def crop_input(self, image: Image.Image, box: PixelBox) -> ImageInput:
        return self._ready(image.convert("RGB").crop(tuple(box)))

    def _ready(self, image: Image.Image) -> ImageInput:
        grid = self.image_grid(image)
        small = image.convert("RGB").resize((grid.columns * CELL, grid.rows * CELL))
        values = torch.tensor(np.asarray(small, dtype=np.float32) / 255 - 0.5)
        return ImageInput(values.permute(2, 0, 1), grid)

    def encode(self, inputs: Sequence[ImageInput]) -> list[Tensor]:
        cells = [
            one.pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL).permute(1, 2, 0, 3, 4)
            for one in inputs
        ]
        return [self.tower(one.flatten(2).flatten(0, 1)) for one in cells]

    # --- sequence ----------------------------------------------------------------------------

    def prefix_length(self, image_tokens: int) -> int:
        return len(self.prompt_ids("").before) + image_tokens

    def prefix_segment(self, image: ImageInput, features: Tensor) -> Segment:
        before = self.prompt_ids("").before
        ids = (*before, *[self.image_token_id] * len(features))
        embeds = torch.cat([self.embed(before), features])
        rows = torch.arange(image.grid.rows).repeat_interleave(image.grid.columns)
        positions = torch.cat([torch.arange(len(before)), len(before) + rows])
        end = len(before) + image.grid.rows
        return Segment(ids, embeds, positions[None], end, slice(len(before), len(ids)))

    def suffix_segment(
        self, start: int, after: Sequence[int], crops: Sequence[CropTokens] = ()
    ) -> Segment:
        embeds, positions = [], []
        for crop in crops:
            rows = torch.arange(crop.rows).repeat_interleave(crop.columns)
            embeds.append(crop.tokens)
            positions.append(start + (rows if crop.keep is None else rows[crop.keep]))
            start += crop.rows
        embeds.append(self.embed(after))
        positions.append(torch.arange(start, start + len(after)))
        inserted = sum(len(crop.tokens) for crop in crops)
        ids = (*[self.image_token_id] * inserted, *after)
        end = start + len(after)
        return Segment(ids, torch.cat(embeds), torch.cat(positions)[None], end)

    # --- layers and answers ------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        return self.model.model

    @property
    def projector(self) -> nn.Module:
        return self.tower

    def generate(
        self,
        ids: Tensor,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Cache,
        arguments: Mapping[str, Any],
    ) -> Tensor:
        behind = ids.shape[1] - positions.shape[-1]
        return self.model.generate(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=nn.functional.pad(positions[0], (behind, 0)),
            **cache_argument(cache),
            **arguments,
        )

    def plain_inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        raise NotImplementedError("the double answers questions on one image only")

    # --- the region proposal network ---------------------------------------------------------

    def rpn_shape(self) -> dict[str, Any]:
        return {
            "backbone": self.model_type,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "rms_norm_eps": self.text_config.rms_norm_eps,
            "image_tokens": None,
            "head_bias": True,
            "rotary_head": True,
            "final_norm": False,
        }

    @classmethod
    def new_decoder_layer(cls, config: RPNConfig, index: int, attention: str) -> nn.Module:
        shape = Qwen2Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.depth - 1,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
        )
        shape._attn_implementation = attention
        return Qwen2DecoderLayer(shape, index)

    @classmethod
    def new_norm(cls, config: RPNConfig) -> nn.Module:
        return Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)


@contextmanager
def registered() -> Iterator[None]:
    """The double as a known family, for as long as this lasts."""
    registry.FAMILIES[Double.model_type] = Double
    try:
        yield
    finally:
        del registry.FAMILIES[Double.model_type]
