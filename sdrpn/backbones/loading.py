"""Loading base models of any family, with checks of their arguments and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, PreTrainedConfig
from transformers.utils import logging

from sdrpn.backbones.adapters import load_adapter, quantization_arguments
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
    """Raised if a model cannot be found or downloaded; the message has the cause and remedy."""


@dataclass(frozen=True)
class Architecture:
    """How a family is loaded with transformers.

    Args:
        what: The family in messages, such as "a LLaVA-1.5".
        example: Hub id of a model of the family.
        config: Configuration class.
        model: Model class.
        half: Data type of the published weights; the default on an accelerator.
        check: Takes a config.json and the model's name; raises ValueError for other families.
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
        pretrained: Folder or Hub id.
        dtype: Data type of the weights; `auto` is float32 on the CPU and `kind.half` on an
            accelerator.
        device: A single device; default: the GPU if there is one.
        device_map: accelerate's device map, instead of `device`. Modules offloaded to "cpu" or
            "disk" are computed on the GPU if there is one.
        offload_folder: Folder for modules offloaded to "disk" from other formats than safetensors.
        attn_implementation: Attention implementation, such as sdpa.
        revision: Branch, tag or commit of a Hub id.
        num_layers: Load only the first `num_layers` decoder layers, for RPN training; such a model
            cannot generate.
        peft: Folder or Hub id of a PEFT adapter.
        load_in_4bit: Quantize the language model with bitsandbytes.

    Raises:
        ValueError: If the model is of another family, a file is broken, or a tensor is missing or
            not finite.
        WeightsUnavailable: If the model cannot be found or downloaded.
    """
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is None:
        device_map = {"": str(device or default_device)}
    weights = pick_dtype(dtype, _compute_device(device_map, default_device), kind.half)
    arguments = {
        "dtype": weights,
        "device_map": device_map,
        "offload_folder": offload_folder,
        "attn_implementation": attn_implementation,
    }
    with _explain_unavailable(pretrained, revision):
        source = Source(pretrained, revision=revision)
        config = _read_config(kind, source, revision)
        check_has_tokenizer(pretrained, kind.example)
        if load_in_4bit:
            arguments |= quantization_arguments(weights)
        with (
            _first_layers(kind, config, pretrained, num_layers) as shape,
            explain_load_errors(pretrained, revision),
        ):
            loaded = _read_model(kind, source.fetch_all(), arguments | shape)
    model, processor, loading_info = loaded
    check_complete(loading_info, str(pretrained))
    if peft is not None:
        model = load_adapter(model, peft, merge=not load_in_4bit)
    check_finite(named_weights(model), str(pretrained))
    return Loaded(model, processor, config)


def _read_model(
    kind: Architecture, folder: Path, arguments: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Read the model, its processor and transformers' loading info."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model, loading_info = kind.model.from_pretrained(
        folder,
        # check_complete raises for mismatched sizes, with both shapes.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **arguments,
    )
    return model, processor, loading_info


@contextmanager
def _explain_unavailable(pretrained: str, revision: str | None) -> Iterator[None]:
    """Re-raise OSError as WeightsUnavailable, with the cause and remedy."""
    try:
        yield
    except OSError as error:
        cause = str(error) if isinstance(error, hub.HubError) else None
        cause = cause or hub.explain(error, pretrained, revision=revision) or first_line(error)
        raise WeightsUnavailable(f"cannot load {pretrained!r}: {cause}") from error


def _read_config(kind: Architecture, source: Source, revision: str | None) -> dict[str, Any]:
    """Read config.json and check that it is the family's."""
    with explain_load_errors(source.name, revision):
        folder = source.folder or source.fetch(CONFIG_FILE, kind.what).parent
        config, _ = PreTrainedConfig.get_config_dict(folder)
    if not config or not isinstance(config, dict):
        raise OSError("config.json is missing or is not a JSON object")
    kind.check(config, source.name)
    return config


def check_has_tokenizer(folder: str, example: str) -> None:
    """Check that a local model has a tokenizer; Hub ids pass unchecked.

    Args:
        folder: Folder or Hub id.
        example: Hub id of a model of the family, for the message.

    Raises:
        ValueError: If the folder has no tokenizer file.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZER_FILES)}): copy there the "
            f"tokenizer files of its base model, such as {example}"
        )


def pick_dtype(
    dtype: str | torch.dtype, device: torch.device, half: torch.dtype = torch.float16
) -> torch.dtype:
    """Resolve a data type.

    Args:
        dtype: A torch dtype, its name, or `auto`.
        device: Device of the computations.
        half: What `auto` is on an accelerator; on the CPU, it is float32.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    dtype = dtype.removeprefix("torch.")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else half
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _compute_device(device_map: str | dict[str, Any], default: str) -> torch.device:
    """Return the first accelerator of a device map, on which offloaded modules run too."""
    if isinstance(device_map, str):
        return torch.device("cpu" if device_map == "cpu" else default)
    accelerators = [device for device in device_map.values() if device not in ("cpu", "disk")]
    return torch.device(accelerators[0] if accelerators else "cpu")


@contextmanager
def _first_layers(
    kind: Architecture, config: dict[str, Any], name: str, num_layers: int | None
) -> Iterator[dict[str, Any]]:
    """Yield arguments of from_pretrained that load only the first decoder layers, or none for all.

    Raises ValueError if config.json is invalid, or describes a larger model than the weights.
    """
    with explain_load_errors(name):
        shape = kind.config.from_dict(config)
        with torch.device("meta"):
            model = kind.model(shape)
    check_size(sum(weight.numel() for weight in model.parameters()), name)
    if num_layers is None:
        yield {}
        return
    text: Any = shape.text_config
    if num_layers > text.num_hidden_layers:
        raise ValueError(
            f"{name} has {counted(text.num_hidden_layers, 'decoder layer')}, {num_layers} "
            f"{agree(num_layers, 'is', 'are')} needed"
        )
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    # transformers would list the weights of the omitted layers in a long warning.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield {"config": shape}
    finally:
        logging.set_verbosity(level)
