"""Loading a base model of any family: arguments checked, weights read, what is broken named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, PreTrainedConfig
from transformers.utils import logging

from sdrpn.backbones.adapters import four_bits, with_adapter
from sdrpn.io import hub
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source, first_line
from sdrpn.io.checkpoints import (
    check_complete,
    check_finite,
    check_size,
    explain_load_errors,
    named_weights,
)
from sdrpn.io.plurals import agree, counted

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class WeightsUnavailable(OSError):
    """The weights of a model could not be found: no such folder, or no hub within reach."""


@dataclass(frozen=True)
class Architecture:
    """What transformers calls a family, and how it is told from others.

    Args:
        what: The family in a sentence, such as "a LLaVA-1.5".
        example: A Hub id of it.
        config: Its configuration class.
        model: Its model class.
        half: The type its weights were published in; what `auto` is on an accelerator.
        check: Raises ValueError for a config.json (and the model's name) that is not the family's.
    """

    what: str
    example: str
    config: Any
    model: Any
    half: torch.dtype
    check: Callable[[dict[str, Any], str], None]


class Loaded(NamedTuple):
    """A model with its processor, and the config.json it was loaded from."""

    model: Any
    processor: Any
    config: dict[str, Any]


def load_model(
    kind: Architecture,
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
) -> Loaded:
    """Load a model and its processor from a folder or a Hub id.

    Args:
        kind: The family.
        pretrained: A folder or a Hub id.
        dtype: Of the weights; `auto` is float32 on the CPU and the family's own on an accelerator.
        device: One device; default: the GPU where there is one.
        device_map: accelerate's, instead of a device; parts of it may be "cpu" or "disk", which are
            computed on the GPU where there is one.
        offload_folder: Where "disk" parts of weights that are not safetensors are written;
            safetensors are read from where they are.
        attn_implementation: The attention implementation, such as sdpa.
        revision: Branch, tag or commit of a Hub id.
        num_layers: Read only the first decoder layers, for training an RPN over them; such a model
            cannot answer.
        peft: A PEFT adapter to put on it.
        load_in_4bit: Its language model, with bitsandbytes.

    Raises:
        ValueError: It is another kind of model, or has a file that is broken or a tensor that is
            missing or not finite, naming it.
        WeightsUnavailable: There is nothing to load, or the Hub does not hand it out, with the
            cause and its remedy.
    """
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is None:
        device_map = {"": str(device or fastest)}
    weights = pick_dtype(dtype, _computing_device(device_map, fastest), kind.half)
    try:
        source = Source(pretrained, revision=revision)
        with explain_load_errors(pretrained, revision):
            folder = source.folder or source.fetch(CONFIG_FILE, kind.what).parent
            config, _ = PreTrainedConfig.get_config_dict(folder)
        if not config or not isinstance(config, dict):
            raise OSError("there is no config.json, or none that holds an object")
        kind.check(config, pretrained)
        check_has_tokenizer(pretrained, kind.example)
        quantized = four_bits(weights) if load_in_4bit else {}
        with (
            _first_layers(kind, config, pretrained, num_layers) as shape,
            explain_load_errors(pretrained, revision),
        ):
            folder = source.fetch_all()
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            loaded: Any = kind.model.from_pretrained(
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
        told = told or hub.explain(error, pretrained, revision=revision) or first_line(error)
        raise WeightsUnavailable(f"cannot load {pretrained!r}: {told}") from error
    model, found = loaded
    check_complete(found, str(pretrained))
    if peft is not None:
        model = with_adapter(model, peft, merge=not load_in_4bit)
    check_finite(named_weights(model), str(pretrained))
    return Loaded(model, processor, config)


def check_has_tokenizer(folder: str, example: str) -> None:
    """Refuse, by name, a local model without a tokenizer; a hub id is not looked at."""
    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZER_FILES)}): copy there the "
            f"tokenizer files of the model it was made from, such as {example}"
        )


def pick_dtype(
    dtype: str | torch.dtype, device: torch.device, half: torch.dtype = torch.float16
) -> torch.dtype:
    """`auto` is float32 on the CPU and `half`, the model's own, on an accelerator."""
    if isinstance(dtype, torch.dtype):
        return dtype
    dtype = dtype.removeprefix("torch.")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else half
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
    kind: Architecture, config: dict[str, Any], name: str, num_layers: int | None
) -> Iterator[dict[str, Any]]:
    """Arguments of from_pretrained that read the first decoder layers only; all by default.

    Raises ValueError where config.json makes no sense, or far more of a model than there is.
    """
    with explain_load_errors(name):
        shape = kind.config.from_dict(config)
        with torch.device("meta"):
            whole = kind.model(shape)
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
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    # The layers left out would be listed as unexpected, one warning of many lines.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield {"config": shape}
    finally:
        logging.set_verbosity(level)
