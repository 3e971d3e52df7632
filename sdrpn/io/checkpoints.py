"""Checks for missing, truncated and non-finite tensors, and access to offloaded weights."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sdrpn.io import hub
from sdrpn.io.atomic import read_object
from sdrpn.io.checkpoint_files import INDEXES, first_line, tensor_names
from sdrpn.io.plurals import counted

MAX_LAYERS = 1000
"""Maximum number of layers in a config.json, checked before a model is built."""

PARAMETERS_A_BYTE = 2
"""Parameters per byte of 4-bit weights, the smallest supported."""


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module computes on, also if its weights are offloaded elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a single hook or a SequentialHook
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters, fetching offloaded ones one submodule at a time.

    A fetched tensor is valid until the next iteration.
    """
    for prefix, part in module.named_modules():
        with align_module_device(part):
            for name, weight in part.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, weight.detach()


def copy_weights(own: nn.Module, theirs: nn.Module) -> None:
    """Copy the weights of `theirs`, offloaded or not, to `own`.

    Raises:
        ValueError: If `own` has parameters that `theirs` lacks.
    """
    with torch.no_grad():
        targets = dict(own.named_parameters())
        for name, weight in named_weights(theirs):
            targets.pop(name).copy_(weight)
    if targets:
        raise ValueError(f"no weights to copy to {', '.join(sorted(targets))}")


def check_finite(
    tensors: Iterable[tuple[str, Tensor]],
    where: str,
    hint: str = "the file is damaged or its training diverged: download or train the weights again",
) -> None:
    """Check tensors for NaN and infinity, in one pass at memory bandwidth.

    Args:
        tensors: (name, tensor); integer, empty and meta tensors are skipped.
        where: Model or file, for the message.
        hint: Remedy, for the message.

    Raises:
        ValueError: If a tensor is not finite.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.detach()
        if values.element_size() == 1:  # torch has no aminmax for 8-bit floats
            values = values.float()
        # Both extremes propagate NaN; isfinite() would allocate a mask as large as the weights.
        if not all(torch.isfinite(edge) for edge in torch.aminmax(values)):
            raise ValueError(f"{where}: {name} holds values that are not finite; {hint}")


def check_complete(found: Mapping[str, Any], where: str) -> None:
    """Check that transformers initialised no weight at random.

    Args:
        found: The loading info of `from_pretrained(output_loading_info=True)`.
        where: Model, for the message.

    Raises:
        ValueError: If a weight is missing or has another shape than config.json describes.
    """
    for name, *shapes in sorted(found["mismatched_keys"]):
        held, expected = (list(shape) for shape in shapes)
        raise ValueError(
            f"{where}: {name} has the shape {held}, but its config.json asks for {expected}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise ValueError(f"{where} lacks {missing[0]}{more}: a file is missing or incomplete")


def check_layers(config: Mapping[str, Any], where: str) -> None:
    """Check the layer counts of a config.json.

    Raises:
        ValueError: If a count is not an integer up to `MAX_LAYERS`.
    """
    for part in ("text_config", "vision_config"):
        values = config.get(part) or {}
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{where}: {part} of config.json must be an object, got {values!r:.80}"
            )
        count = values.get("num_hidden_layers", 0)
        if type(count) is not int or not 0 <= count <= MAX_LAYERS:
            raise ValueError(
                f"{where}: num_hidden_layers in {part} of config.json must be a number up to "
                f"{MAX_LAYERS}, got {count!r:.80}"
            )


def check_size(parameters: int, model: str) -> None:
    """Check that the weights files of a folder are large enough for a model.

    transformers would allocate missing weights and initialise them at random. Hub ids pass
    unchecked.

    Raises:
        ValueError: If the files cannot hold `parameters` parameters.
    """
    files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]
    held = sum(path.stat().st_size for path in files)
    if files and parameters > PARAMETERS_A_BYTE * held:
        raise ValueError(
            _broken_weights(Path(model))
            or f"{model}: its config.json describes "
            f"{counted(parameters, 'parameter', commas=True)}, more than its weights files of "
            f"{counted(held, 'byte', commas=True)} can hold: a file is missing, or config.json "
            "belongs to another model"
        )


@contextmanager
def explain_load_errors(model: str, revision: str | None = None) -> Iterator[None]:
    """Re-raise loading errors with the damaged file and its remedy.

    Args:
        model: Folder or Hub id that is loaded.
        revision: Revision of a Hub id.

    Raises:
        ValueError: If a file is malformed; names it where it can be found.
        OSError: If the Hub cannot be reached, or a file is missing.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many types
        folder = hub.local_folder(model, revision)
        if isinstance(error, OSError):
            # transformers reports a damaged file in the cache as missing.
            if folder is None or hub.explain(error, model) or not (cause := _broken_file(folder)):
                raise
        elif cause := hub.explain(error, model, revision=revision):
            raise OSError(cause) from error
        else:
            cause = folder and _broken_file(folder)
            cause = cause or f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"cannot load {model!r}: {cause}") from error


def _broken_file(folder: Path) -> str | None:
    """Describe the first unreadable file, weights first; None if all are readable."""
    if problem := _broken_weights(folder):
        return problem
    for path in sorted(folder.glob("*.json")):
        if path.read_bytes().startswith(codecs.BOM_UTF8):  # transformers cannot read it
            return f"{path} starts with a byte order mark: save it as UTF-8 without one"
        try:
            values = read_object(path, f"; {hub.remedy(path)}")
        except (OSError, ValueError) as error:
            return str(error)
        named = values.get("weight_map") if path.name in INDEXES else None
        for file in sorted(set(named.values())) if isinstance(named, dict) else ():
            if not (folder / str(file)).is_file():
                return f"{path} names {file}, which does not exist: copy or download it again"
    return None


def _broken_weights(folder: Path) -> str | None:
    """Describe the first unreadable weights file; None if all are readable."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            tensor_names(path)
        except (OSError, ValueError) as error:
            return str(error)
    return None
