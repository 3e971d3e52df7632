"""Weights that are there, whole, and numbers; or one sentence that says which are not."""

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
from sdrpn.io.checkpoint_files import INDEXES, reason, tensor_names
from sdrpn.io.plurals import counted

MAX_LAYERS = 1000
"""More layers than any model of this kind has; a config.json that asks for more is refused before
anything is built."""

PARAMETERS_A_BYTE = 2
"""Of weights in 4 bits, the fewest that are read."""


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or the one offloaded weights are fetched to."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # one, or several in a sequence
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters by name, those that are offloaded fetched one submodule at a time.

    A fetched tensor is valid until the next one is asked for.
    """
    for prefix, part in module.named_modules():
        with align_module_device(part):
            for name, weight in part.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, weight.detach()


def copy_weights(own: nn.Module, theirs: nn.Module) -> None:
    """Copy a module's weights, offloaded or not, into one of the same shape."""
    with torch.no_grad():
        targets = dict(own.named_parameters())
        for name, weight in named_weights(theirs):
            targets.pop(name).copy_(weight)
    if targets:
        raise ValueError(f"no weights to copy for {', '.join(sorted(targets))}")


def check_finite(
    tensors: Iterable[tuple[str, Tensor]],
    where: str,
    mend: str = "the file is damaged, or its training went wrong: get these weights anew",
) -> None:
    """Raise ValueError that names the first tensor with a NaN or an infinity.

    One pass over the weights at the memory's speed; what holds no floats is passed over, and so is
    what has no values (on the meta device). where: the model or file, for the message.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.detach()
        if values.element_size() == 1:  # of 8-bit floats torch knows no maximum
            values = values.float()
        # NaN goes through both; isfinite() would write a mask as large as the weights.
        if not all(torch.isfinite(edge) for edge in torch.aminmax(values)):
            raise ValueError(f"{where}: {name} holds values that are not finite; {mend}")


def check_complete(found: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for weights that transformers would make up: missing, or of another shape.

    found: what from_pretrained tells with output_loading_info.
    """
    for name, *shapes in sorted(found["mismatched_keys"]):
        held, asked = (list(shape) for shape in shapes)
        raise ValueError(
            f"{where}: {name} has the shape {held}, but its config.json asks for {asked}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise ValueError(f"{where} lacks {missing[0]}{more}: a file is missing or incomplete")


def check_layers(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a config.json that asks for more layers than could be meant."""
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
    """Raise ValueError where a folder's weights files cannot hold a model of so many parameters.

    transformers would make up the rest, in memory. Of a hub id nothing is checked.
    """
    files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]
    held = sum(path.stat().st_size for path in files)
    if files and parameters > PARAMETERS_A_BYTE * held:
        raise ValueError(
            _broken_weights(Path(model))
            or f"{model}: its config.json describes "
            f"{counted(parameters, 'parameter', commas=True)}, more "
            "than its "
            f"weights files of {counted(held, 'byte', commas=True)} can hold: a file is missing, "
            "or "
            "config.json is "
            "another's"
        )


@contextmanager
def broken_files_named(model: str, revision: str | None = None) -> Iterator[None]:
    """Turn what loading raises for files that make no sense into ValueError, named where possible.

    OSError, which transformers raises where something is not there, passes, and so does what no
    file is to blame for. An error of the connection to the Hub becomes an OSError.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many kinds
        folder = hub.local_folder(model, revision)
        if isinstance(error, OSError):
            # transformers says of a damaged file of the cache that it is not there.
            if folder is None or hub.explain(error, model) or not (told := _broken_file(folder)):
                raise
        elif told := hub.explain(error, model, revision=revision):
            raise OSError(told) from error
        else:
            told = (folder and _broken_file(folder)) or f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"cannot load {model!r}: {told}") from error


def _broken_file(folder: Path) -> str | None:
    """What is wrong with the first file that cannot be read, weights first; None where all can."""
    if told := _broken_weights(folder):
        return told
    for path in sorted(folder.glob("*.json")):
        if path.read_bytes().startswith(codecs.BOM_UTF8):  # which transformers does not read
            return f"{path} starts with a byte order mark: save it as UTF-8 without one"
        try:
            values = read_object(path, f"; {hub.remedy(path)}")
        except (OSError, ValueError) as error:
            return str(error)
        named = values.get("weight_map") if path.name in INDEXES else None
        for file in sorted(set(named.values())) if isinstance(named, dict) else ():
            if not (folder / str(file)).is_file():
                return f"{path} names {file}, which is not there: copy or download it again"
    return None


def _broken_weights(folder: Path) -> str | None:
    """What is wrong with the first weights file that cannot be read; None where all can."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            tensor_names(path)
        except (OSError, ValueError) as error:
            return str(error)
    return None
