"""Checkpoint files: local folder or Hub repository, single file or shards, .safetensors or .bin.

Pickles are loaded with `weights_only=True`, and only the requested files are fetched and read.
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
"""Patterns of a model's files in the Hugging Face layout, the preferred weight format first."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
PICKLED = "get a .safetensors copy, or download the file again if it should hold tensors only"


class Source:
    """A local folder or Hub repository, whose files are fetched one at a time.

    Args:
        name: Folder or Hub id.
        **download: Arguments of `hf_hub_download`, such as `revision`.

    Raises:
        FileNotFoundError: If `name` is a path, but not of a folder.
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
        """Return the local path of a file, fetching it if needed; None if it does not exist.

        Raises:
            OSError: If the Hub refuses the repository or the download fails, with the cause and
                remedy.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, file, **self.download))
        except LocalEntryNotFoundError as error:
            # The Hub cannot be reached. Another candidate file may be in the cache.
            self._unreachable = self._unreachable or self._refused(error, file)
        except EntryNotFoundError:
            pass
        except Exception as error:  # from the Hub, its client or the cache
            raise self._refused(error, file) from error
        return None

    def fetch_all(self) -> Path:
        """Return the folder with all settings and weights, fetching them if needed.

        Fetched here, since transformers reports any refusal of the Hub as a missing file.

        Raises:
            OSError: As `find`.
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
        except Exception as error:  # from the Hub, its client or the cache
            raise self._refused(error) from error
        return folder

    def _refused(self, error: Exception, file: str | None = None) -> Exception:
        """Return an error that explains the refusal, or the given one if its cause is unknown."""
        revision = self.download.get("revision")
        cause = hub.cause(error, self.name, revision=revision)
        if cause is None:
            return error
        missing = (RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled)
        causes = (error, error.__cause__)
        is_missing = any(
            isinstance(c, missing) and not isinstance(c, GatedRepoError) for c in causes
        )
        if is_missing:
            return hub.HubFileNotFound(
                f"{self.name} is no folder, and {file or 'its files'} cannot be fetched: {cause}"
            )
        return hub.HubError(hub.explain(error, self.name, file, revision=revision))

    def fetch(self, file: str, what: str = "a checkpoint") -> Path:
        """Return the local path of a file as `find` does, but raise FileNotFoundError without one.

        Args:
            file: File name.
            what: What the file belongs to, for the error message.
        """
        path = self.find(file)
        if path is None:
            raise self.lacks(file, what)
        return path

    def lacks(self, files: str, what: str) -> Exception:
        """Return the error for missing files, or the cause if the Hub could not be reached."""
        if self._unreachable is not None:
            return self._unreachable
        return FileNotFoundError(f"{self.name} holds no {files}: it is not {what}")

    def config(self, what: str = "a checkpoint") -> dict[str, Any]:
        """Read config.json; `what` as in `fetch`."""
        path = self.fetch(CONFIG_FILE, what)
        return read_object(path, f"; {hub.remedy(path)}")


def first_line(error: Exception) -> str:
    """Return the first line of an error message, to be quoted in another one.

    For a refused pickle only the refused name is quoted, since torch's message advises to disable
    the check.
    """
    text = str(error)
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        refused = re.search(r"GLOBAL (\S+)", text) or re.search(
            r"Unsupported (?:global|class) (\S+)", text
        )
        if refused:
            return f"it holds a Python object ({refused[1]}), and code in a checkpoint is never run"
        return "it holds more than tensors, or is damaged; code in a checkpoint is never run"
    return next(iter(text.splitlines()), type(error).__name__)


class Weights:
    """Tensors of a checkpoint by name, loaded on demand.

    Args:
        source: Folder or repository of the checkpoint.
        files: Candidate files of unsharded weights, such as adapter_model.safetensors.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the index is malformed.
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
        """Load the named tensors on the CPU, reading only the files that hold them."""
        where = self._where or {}
        shards: dict[str, list[str]] = {}
        for name in names:
            shards.setdefault(where[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, held in shards.items():
            tensors |= _read(self.source.fetch(file), held)
        return tensors


def read_all(path: Path) -> dict[str, Tensor]:
    """Load every tensor of one file on the CPU.

    Raises:
        ValueError: If the file is damaged or holds more than tensors.
    """
    return _read(path, tensor_names(path))


def _weight_map(path: Path) -> dict[str, str]:
    where = read_object(path, f"; {hub.remedy(path)}").get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(
            f"{path} has no weight_map, which maps tensors to files; {hub.remedy(path)}"
        )
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path} maps {name} to {file!r}, which is not a file beside it")
    return where


def tensor_names(path: Path) -> list[str]:
    """List the tensors of one weights file.

    Raises:
        ValueError: If the file is damaged.
    """
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
    """Load the tensors of a .bin file without executing code, memory-mapped if possible."""
    try:
        state = _torch_load(path)
    except OSError:
        raise
    except Exception as error:  # torch raises many types for a damaged or hostile file
        problem = first_line(error)
        hint = PICKLED if "never run" in problem else hub.remedy(path)
        raise ValueError(f"{path} is not a file of tensors: {problem}; {hint}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a file of tensors by name")
    return state


def _torch_load(path: Path) -> Any:
    with open(path, "rb") as file:
        # Only zip archives can be memory-mapped; torch before 1.6 wrote another format.
        zipped = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
