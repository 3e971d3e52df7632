"""Weights as others store them: a folder or a hub id, one file or shards, .safetensors or .bin.

Nothing is unpickled freely, and no file is fetched or read that is not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdrpn.io import hub
from sdrpn.io.atomic import read_object

CONFIG_FILE = "config.json"
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Files of a model in the Hugging Face layout; of weights the first kind that there is."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
PICKLED = "get a .safetensors copy, or download the file again if it should hold tensors only"


class Source:
    """A folder or a repository of the hub, whose files are had one by one.

    download: arguments of hf_hub_download, such as revision. Raises FileNotFoundError for a name
    that can only be a folder and is none.
    """

    def __init__(self, name: str, **download: Any) -> None:
        self.name, self.download = name, download
        self.folder = Path(name) if Path(name).is_dir() else None
        self._unreachable: Exception | None = None
        if Path(name).is_file():
            raise FileNotFoundError(f"{name} is a file; give the folder that it is in")
        if self.folder is None and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise FileNotFoundError(f"there is no folder {name}")

    def find(self, file: str) -> Path | None:
        """Where a file lies, fetched first where that is needed; None where there is none.

        Raises OSError with the cause and its remedy where the Hub refuses the repository, or the
        download fails.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, file, **self.download))
        except LocalEntryNotFoundError as error:
            # Not known: the Hub could not be asked. Another of the files looked for may be cached.
            self._unreachable = self._unreachable or self._refused(error, file)
        except EntryNotFoundError:
            pass
        except Exception as error:  # of the Hub, its client, the cache
            raise self._refused(error, file) from error
        return None

    def fetch_all(self) -> Path:
        """The folder with all its settings and weights, fetched first where that is needed.

        transformers says of a file that the Hub refused that it is not there, whatever the cause.
        Raises OSError as `find` does.
        """
        if self.folder is not None:
            return self.folder
        try:
            for weights in WEIGHTS:
                folder = Path(
                    snapshot_download(
                        self.name,
                        allow_patterns=[*SETTINGS, weights],
                        ignore_patterns=["*/*"],
                        **self.download,
                    )
                )
                if any(folder.glob(weights)):
                    break
        except Exception as error:  # of the Hub, its client, the cache
            raise self._refused(error) from error
        return folder

    def _refused(self, error: Exception, file: str | None = None) -> Exception:
        """The error with a sentence about it; as it is where nothing is known of it."""
        revision = self.download.get("revision")
        told = hub.cause(error, self.name, revision=revision)
        if told is None:
            return error
        missing = (RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled)
        causes = (error, error.__cause__)
        is_missing = any(
            isinstance(c, missing) and not isinstance(c, GatedRepoError) for c in causes
        )
        if is_missing:
            return hub.HubFileNotFound(
                f"{self.name} is no folder, and {file or 'its files'} cannot be fetched: {told}"
            )
        return hub.HubError(hub.explain(error, self.name, file, revision=revision))

    def fetch(self, file: str, what: str = "a checkpoint") -> Path:
        """As `find`; raises FileNotFoundError that names the file where there is none."""
        path = self.find(file)
        if path is None:
            raise self.lacks(file, what)
        return path

    def lacks(self, files: str, what: str) -> Exception:
        """The error for missing files; says why, where the Hub could not be asked."""
        if self._unreachable is not None:
            return self._unreachable
        return FileNotFoundError(f"{self.name} holds no {files}: it is not {what}")

    def config(self, what: str = "a checkpoint") -> dict[str, Any]:
        """Its config.json."""
        path = self.fetch(CONFIG_FILE, what)
        return read_object(path, f"; {hub.remedy(path)}")


def reason(error: Exception) -> str:
    """The first line of what an error says, for a sentence of our own.

    Of torch's refusal to unpickle only what it refused: its advice is to switch that off.
    """
    text = str(error)
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        asked = re.search(r"GLOBAL (\S+)", text) or re.search(
            r"Unsupported (?:global|class) (\S+)", text
        )
        if asked:
            named = asked[1] or asked[2]
            return f"it holds a Python object ({named}), and code in a checkpoint is never run"
        return "it holds more than tensors, or is damaged; code in a checkpoint is never run"
    return next(iter(text.splitlines()), type(error).__name__)


class Weights:
    """The tensors of a checkpoint by name, read from their files when they are asked for.

    files: stems to look for instead of a whole model's, such as adapter_model.safetensors.
    Raises FileNotFoundError where there are none, ValueError for an index that makes no sense.
    """

    def __init__(self, source: Source, files: tuple[str, ...] = SINGLE_FILES) -> None:
        self.source = source
        self._where = self._from_index() if files is SINGLE_FILES else None
        if self._where is None:
            self._where = self._from_single(files)

    @property
    def names(self) -> Iterable[str]:
        return self._where.keys() if self._where else ()

    def _from_index(self) -> dict[str, str] | None:
        for file in INDEXES:
            path = self.source.find(file)
            if path is not None:
                return _weight_map(path)
        return None

    def _from_single(self, files: tuple[str, ...]) -> dict[str, str]:
        for file in files:
            path = self.source.find(file)
            if path is not None:
                return dict.fromkeys(tensor_names(path), file)
        looked = (*INDEXES, *files) if files is SINGLE_FILES else files
        raise self.source.lacks(f"weights ({', '.join(looked)})", "a checkpoint")

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU; touches only the files that hold them."""
        where = self._where or {}
        shards: dict[str, list[str]] = {}
        for name in names:
            shards.setdefault(where[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in shards.items():
            tensors |= _read(self.source.fetch(file), inside)
        return tensors


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file, on the CPU; raises ValueError that names the file."""
    return _read(path, tensor_names(path))


def _weight_map(path: Path) -> dict[str, str]:
    where = read_object(path, f"; {hub.remedy(path)}").get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(
            f"{path} has no weight_map, which says where each tensor is; {hub.remedy(path)}"
        )
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path} puts {name} into {file!r}, which is no file beside it")
    return where


def tensor_names(path: Path) -> list[str]:
    """The names in one weights file; raises ValueError that names the file where it is broken."""
    if path.suffix != ".safetensors":
        return list(_unpickled(path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}; {hub.remedy(path)}"
        ) from None


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        state = _unpickled(path)
        missing = [name for name in names if name not in state]
        tensors = {name: state[name] for name in names if name in state}
    else:
        held = set(tensor_names(path))
        missing = [name for name in names if name not in held]
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names if name in held}
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}, which its index puts there")
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]} is {tensors[wrong[0]].dtype}; quantised weights are not read"
        )
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A .bin file's tensors, mapped from the disk where its format allows; never its code."""
    try:
        state = _torch_load(path)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is broken or hostile
        told = reason(error)
        mend = PICKLED if "never run" in told else hub.remedy(path)
        raise ValueError(f"{path} is not a file of tensors: {told}; {mend}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a file of tensors by name")
    return state


def _torch_load(path: Path) -> Any:
    with open(path, "rb") as file:
        # Files of torch before 1.6 are no zip archives, and only those can be mapped.
        zipped = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
