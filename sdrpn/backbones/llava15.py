"""The one seam to transformers: load a LLaVA-1.5, write its prompt, show it images, run its layers.

Shapes: B rows, N new tokens, P cached tokens, C hidden size, T image tokens (576).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from sdrpn import hub
from sdrpn.backbones.adapters import four_bits, with_adapter
from sdrpn.backbones.plain_text import IMAGE_TOKEN, PlainText
from sdrpn.config import ASPECT_RATIO, NOTED_PADDINGS, PADDINGS, VICUNA_SYSTEM_PROMPT
from sdrpn.convert.checkpoint import CONFIG_FILE, Source, reason
from sdrpn.inference.decoder import Span, cache_argument, positions_of
from sdrpn.io.checkpoints import (
    broken_files_named,
    check_complete,
    check_finite,
    check_layers,
    check_size,
    execution_device,
    named_weights,
)
from sdrpn.io.images import as_shown, bounded
from sdrpn.plurals import agree, counted
from sdrpn.roi.postprocess import PixelBox, View, crop

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class WeightsUnavailable(OSError):
    """The weights of a model could not be found: no such folder, or no hub within reach."""


def check_reachable(pretrained: str, revision: str | None = None, peft: str | None = None) -> None:
    """Fetch the small file of a base model and of its adapter, by which a refusal shows.

    Raises WeightsUnavailable, with the cause and its remedy.
    """
    for name, of, file in ((pretrained, revision, CONFIG_FILE), (peft, None, ADAPTER_FILE)):
        if name and not os.path.isdir(name):
            try:
                Source(name, revision=of).fetch(file, "a model or an adapter")
            except OSError as error:
                raise WeightsUnavailable(f"cannot load {name!r}: {error}") from error


def check_is_llava15(config: dict[str, Any], name: str) -> None:
    """Refuse, by name, every model that is not a LLaVA-1.5. config: its config.json."""
    check_not_llava16(config, name)
    kind = config.get("model_type", "a model without a model_type")
    if kind in ("llava_llama", "llava"):
        check_layers(config, name)
        text = (config.get("text_config") or {}).get("model_type", "llama")
        vision = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
        if kind == "llava_llama" or "mm_vision_tower" in config:
            raise ValueError(
                f"{name} is in the original LLaVA layout (model_type {kind!r}); convert it once "
                f"with `sdrpn convert base {name} --out FOLDER`, or give one in the Hugging Face "
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
        f"{name} is not a LLaVA-1.5 model but {kind}; sdrpn needs a LLaMA language model behind a "
        "CLIP tower with one feature layer and no CLS token, such as llava-hf/llava-1.5-7b-hf"
    )


def check_not_llava16(config: Mapping[str, Any], name: str) -> None:
    """Refuse a LLaVA-1.6 (LLaVA-NeXT), which cuts an image into tiles. config: its config.json."""
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
            "which reads an image in tiles; give a LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf or "
            "liuhaotian/llava-v1.5-7b"
        )


def noted_padding(config: Mapping[str, Any], name: str) -> str:
    """How a model's config.json says its images were made square: `pad`, where it says nothing.

    Raises ValueError for a value that is not known.
    """
    ratio = config.get(ASPECT_RATIO)
    if ratio is None:
        return "pad"
    if not isinstance(ratio, str) or ratio not in NOTED_PADDINGS:
        raise ValueError(
            f"{name}: {ASPECT_RATIO} in config.json must be {' or '.join(NOTED_PADDINGS)}, got "
            f"{ratio!r:.80}; correct it to how the model was trained"
        )
    return NOTED_PADDINGS[ratio]


def check_padding(padding: str | None) -> None:
    """Raise ValueError for a padding that is not known; None is the model's own."""
    if padding is not None and padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")


def check_has_tokenizer(folder: str) -> None:
    """Refuse, by name, a local model without a tokenizer; a hub id is not looked at."""
    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZER_FILES)}): copy there the "
            "tokenizer files of the model it was made from, such as llava-hf/llava-1.5-7b-hf"
        )


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is float32 on the CPU and float16, LLaVA-1.5's own, on an accelerator."""
    if isinstance(dtype, torch.dtype):
        return dtype
    dtype = dtype.removeprefix("torch.")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _computing_device(device_map: str | dict[str, Any], fastest: str) -> torch.device:
    """The first device of a map that computes; what is on the CPU or on disk beside it is moved."""
    if isinstance(device_map, str):
        return torch.device("cpu" if device_map == "cpu" else fastest)
    computing = [place for place in device_map.values() if place not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


@contextmanager
def _first_layers(
    config: dict[str, Any], name: str, num_layers: int | None
) -> Iterator[dict[str, Any]]:
    """Arguments of from_pretrained that read the first decoder layers only; all by default.

    Raises ValueError where config.json makes no sense, or far more of a model than there is.
    """
    with broken_files_named(name):
        shape = LlavaConfig.from_dict(config)
        with torch.device("meta"):
            whole = LlavaForConditionalGeneration(shape)
    check_size(sum(weight.numel() for weight in whole.parameters()), name)
    if num_layers is None:
        yield {}
        return
    text: Any = shape.text_config
    if num_layers > text.num_hidden_layers:
        raise ValueError(
            f"{name} has {counted(text.num_hidden_layers, 'decoder layer')}, {num_layers} "
            f"{agree(num_layers, 'is', 'are')} "
            "needed"
        )
    text.num_hidden_layers = num_layers
    # The layers left out would be listed as unexpected, one warning of many lines.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield {"config": shape}
    finally:
        logging.set_verbosity(level)


class Llava:
    """A frozen LLaVA-1.5 with its processor and its prompt.

    padding: `pad` shows the whole image on a square, as LLaVA-1.5 was trained and scored; `crop`
    uses the checkpoint's own image processor without padding, which cuts the sides off. Default:
    what its config.json notes as `image_aspect_ratio` (`pad`, or `square` for crop), else `pad`.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        *,
        padding: str | None = None,
        system_prompt: str = VICUNA_SYSTEM_PROMPT,
        name: str = "",
    ) -> None:
        check_padding(padding)
        self.model: Any = model.eval().requires_grad_(False)
        self.processor: Any = processor
        self.system_prompt = system_prompt
        self.name = name or model.config._name_or_path
        noted = {ASPECT_RATIO: getattr(model.config, ASPECT_RATIO, None)}
        self.padding: str = padding or noted_padding(noted, self.name)
        vision: Any = model.config.vision_config
        self.side: int = vision.image_size
        self.grid: int = vision.image_size // vision.patch_size
        self.image_tokens = self.grid**2
        self.text_config: Any = model.config.text_config
        self.context_length: int = self.text_config.max_position_embeddings
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
        self.head_ids, _ = self.prompt_ids("")

    @classmethod
    def load(
        cls,
        pretrained: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: str | dict[str, Any] | None = None,
        offload_folder: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        num_layers: int | None = None,
        peft: str | None = None,
        load_in_4bit: bool = False,
        padding: str | None = None,
        system_prompt: str = VICUNA_SYSTEM_PROMPT,
    ) -> Self:
        """Load a LLaVA-1.5 and its processor from a folder or a hub id.

        device: one device (default: the GPU where there is one). device_map: accelerate's, instead
        of a device; parts of it may be "cpu" or "disk", which are computed on the GPU where there
        is one. offload_folder: where "disk" parts of weights that are not safetensors are written;
        safetensors are read from where they are. num_layers: read only the first decoder layers,
        for training an RPN over them; such a model cannot answer. peft: a PEFT adapter to put on
        it. load_in_4bit: its language model, with bitsandbytes. padding: see the class. Raises
        ValueError when it is another kind of model, or has a file that is broken or a tensor that
        is missing or not finite, naming it; WeightsUnavailable when there is nothing to load, or
        the Hub does not hand it out, with the cause and its remedy.
        """
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        if device_map is None:
            device_map = {"": str(device or fastest)}
        target = _computing_device(device_map, fastest)
        weights = pick_dtype(dtype, target)
        check_padding(padding)
        try:
            source = Source(pretrained, revision=revision)
            with broken_files_named(pretrained, revision):
                folder = source.folder or source.fetch(CONFIG_FILE, "a LLaVA-1.5").parent
                config, _ = PreTrainedConfig.get_config_dict(folder)
            if not config or not isinstance(config, dict):
                raise OSError("there is no config.json, or none that holds an object")
            check_is_llava15(config, pretrained)
            padding = padding or noted_padding(config, pretrained)
            check_has_tokenizer(pretrained)
            quantized = four_bits(weights) if load_in_4bit else {}
            with (
                _first_layers(config, pretrained, num_layers) as shape,
                broken_files_named(pretrained, revision),
            ):
                folder = source.fetch_all()
                processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
                loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                    folder,
                    dtype=weights,
                    device_map=device_map,
                    offload_folder=offload_folder,
                    attn_implementation=attn_implementation,
                    # Named below, with both shapes; what transformers makes up is not kept.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **quantized,
                    **shape,
                )
        except OSError as error:
            told = str(error) if isinstance(error, hub.HubError) else None
            told = told or hub.explain(error, pretrained, revision=revision) or reason(error)
            raise WeightsUnavailable(f"cannot load {pretrained!r}: {told}") from error
        model, found = loaded
        check_complete(found, str(pretrained))
        if peft is not None:
            model = with_adapter(model, peft, merge=not load_in_4bit)
        check_finite(named_weights(model), str(pretrained))
        return cls(
            model, processor, padding=padding, system_prompt=system_prompt, name=str(pretrained)
        )

    # --- words -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def prompt(self, question: str, images: int = 1, mark: str = IMAGE_TOKEN) -> str:
        """The vicuna_v1 prompt of METHOD section 1, with a mark for each image before the question.

        A question that holds as many `<image>` as it has images means them by it: several stay
        where they are, a single one goes in front. Any other number is plain text.
        """
        named = question.count(IMAGE_TOKEN)
        if images > 1 and named == images:
            question = question.replace(IMAGE_TOKEN, mark)
        elif images:
            if named == images:
                # As LLaVA-1.5's own training data did: a single image always goes in front.
                question = question.replace(IMAGE_TOKEN, "").strip()
            question = " ".join([mark] * images) + "\n" + question
        system = f"{self.system_prompt} " if self.system_prompt else ""
        return f"{system}USER: {question} ASSISTANT:"

    def whole_ids(self, question: str, images: int = 1, answer: str = "") -> list[int]:
        """Token ids of a whole prompt, one for each image; special tokens in a question are text.

        answer: words that stand behind the prompt.
        """
        prompt = self.prompt(question, images, self.plain_text.mark)
        return self.plain_text.ids(prompt + answer)

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before the image and behind it, each part encoded on its own."""
        ids = self.whole_ids(question)
        where = ids.index(self.image_token_id)
        return ids[:where], ids[where + 1 :]

    def question_ids(self, question: str) -> list[int]:
        """Token ids behind the image: the question and the turn's end, ASSISTANT: included."""
        return self.prompt_ids(question)[1]

    def room(self, question_ids: Sequence[int]) -> int:
        """Tokens the context holds behind one image and these question ids; 0 or less: none.

        Args:
            question_ids: token ids behind the image, as `question_ids` gives them.
        """
        return self.context_length - len(self.head_ids) - self.image_tokens - len(question_ids)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Word embeddings: ids [...] -> [..., C]."""
        table = self.model.get_input_embeddings()
        return table(torch.as_tensor(ids, device=self.device))

    # --- images ------------------------------------------------------------------------------

    def view(self, image: Image.Image) -> View:
        """How the model's square lies on this image."""
        return View(as_shown(image).size, self.grid, self.side, self.padding)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Whole images as the model sees them: [n, 3, side, side], normalised."""
        own = self.processor.image_processor
        processor = self._padder if self.padding == "pad" else own
        images = [bounded(as_shown(image), self.padding) for image in images]
        ready = processor(images=images, do_pad=self.padding == "pad", return_tensors="pt")
        return ready["pixel_values"]

    def crop_pixels(self, crops: Sequence[tuple[Image.Image, PixelBox]]) -> Tensor:
        """Boxes cut from original images and stretched to a square: [n, 3, side, side]."""
        cut = [crop(as_shown(image), box, self.side) for image, box in crops]
        ready = self._padder(images=cut, do_pad=False, do_resize=False, return_tensors="pt")
        return ready["pixel_values"]

    def encode(self, pixels: Tensor) -> Tensor:
        """Vision tower and projector: [n, 3, side, side] -> [n, T, C] image tokens."""
        tower = execution_device(self.model.model.vision_tower)
        pixels = pixels.to(device=tower, dtype=self.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.stack(list(features)).to(self.device)

    # --- layers ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where words are embedded, and so where sequences begin."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def layers(self) -> list[tuple[int, nn.Module]]:
        """The decoder layers with their indices."""
        return list(enumerate(self.model.model.language_model.layers))

    def span(self, embeds: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Span:
        """Mask and positions for new tokens. embeds: [B, N, C]; attention_mask: [B, P + N]."""
        positions = positions_of(attention_mask)[:, -embeds.shape[1] :]
        mask = create_causal_mask(
            config=self.text_config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            **cache_argument(cache),
        )
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            # Once, and not in every layer, which torch's fused attention would do.
            shut = torch.finfo(embeds.dtype).min
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill_(~mask, shut)
        rotary = self.model.model.language_model.rotary_emb(embeds, position_ids=positions)
        return Span(attention_mask, mask, positions, rotary)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and language-model head: [..., C] -> [..., vocabulary]."""
        return self.model.lm_head(self.model.model.language_model.norm(hidden))
