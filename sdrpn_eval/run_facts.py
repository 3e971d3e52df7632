"""What a run was made of, written beside its record: `run_facts_{run}_rank{r}.json`.

Package versions, weights' hashes, arguments, seeds, device, and per task the fingerprints of data,
prompts and scorer. It is written before the first question is answered, so a run that died leaves
its facts and no results: that is how a gate tells.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sdrpn_eval import fingerprints
from sdrpn_eval.questions import Request

FORMAT = 1
PACKAGES = ("sdrpn", "lmms_eval", "torch", "torchvision", "transformers", "tokenizers")
PACKAGES += ("accelerate", "datasets", "numpy", "pillow", "scipy", "peft", "bitsandbytes")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
CHUNK = 1 << 22


@dataclass
class RunFacts:
    """The facts of one process of a run; `add` as often as lmms-eval hands over requests.

    run: name of the run, the same on all ranks; names must sort by time.
    arguments: as resolved, defaults and all. sources: folders of weights by what they are for
    (`pretrained`, `rpn`, `peft`); a hub id is looked up in the local cache.
    """

    folder: Path
    run: str
    rank: int
    world_size: int
    arguments: Mapping[str, Any]
    sources: Mapping[str, str | None]
    device: torch.device
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"run_facts_{self.run}_rank{self.rank}.json"

    def add(self, requests: Sequence[Request], task_dict: Mapping[str, Any]) -> None:
        """Write the facts with the tasks of these requests.

        task_dict: task -> split -> rows, as the evaluator hands it to a model.
        """
        asked = [r for r in requests if not r.padding_only]
        for name in dict.fromkeys(r.task for r in asked):
            own = [r for r in asked if r.task == name]
            self.tasks[name] = _of_task(own, task_dict[name][own[0].split])
            # lmms-eval tells a model neither its seeds nor its command; its task objects know.
            self.seeds = self.seeds or getattr(
                getattr(own[0].task_object, "args", None), "seed", None
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.as_dict(), indent=2, default=str) + "\n")
        unfinished.replace(self.path)

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "run": self.run,
            "rank": self.rank,
            "world_size": self.world_size,
            "versions": versions(),
            "source": source_state(),
            "arguments": {k: _plain(v) for k, v in self.arguments.items()},
            "seeds": self.seeds or {"torch": torch.initial_seed()},
            "device": device_facts(self.device),
            # One process reads the gigabytes; the others load the same files.
            "weights": self._weights() if self.rank == 0 else {},
            "tasks": self.tasks,
        }

    def _weights(self) -> dict[str, str]:
        revision = self.arguments.get("revision")
        return hash_sources(self.sources, revision if isinstance(revision, str) else None)


def _plain(value: Any) -> Any:
    """A model in memory has no content to write down here, only its kind."""
    known = isinstance(value, str | int | float | bool | None)
    return value if known else str(value) if isinstance(value, Path) else type(value).__name__


def _of_task(requests: Sequence[Request], rows: Any) -> dict[str, Any]:
    task = requests[0].task_object
    return {
        "documents": len({r.doc_id for r in requests}),
        "data": fingerprints.data_fingerprint(rows, (r.doc_id for r in requests)),
        "prompts": fingerprints.prompts_fingerprint(requests),
        "generation": fingerprints.generation_fingerprint(requests),
        "scorer": fingerprints.scorer_fingerprint(task) if hasattr(task, "config") else None,
    }


def versions() -> dict[str, str]:
    """Python's and the packages' that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build it is, which the package's version omits
    return found


def source_state() -> dict[str, Any] | None:
    """Commit of the checkout that sdrpn runs from, and whether it was changed; None in a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the run computed on."""
    facts: dict[str, Any] = {
        "type": device.type,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda" and torch.cuda.is_available():
        facts |= {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["gpus"] = torch.cuda.device_count()
    return facts


def hash_sources(sources: Mapping[str, str | None], revision: str | None = None) -> dict[str, str]:
    """blake2b of every weight file, by "what it is for/name of the file".

    revision: of the base model (`pretrained`) alone.
    """
    files = {
        f"{use}/{file.name}": file
        for use, source in sources.items()
        if source and (folder := local_folder(source, revision if use == "pretrained" else None))
        for pattern in WEIGHTS
        for file in sorted(folder.glob(pattern))
    }

    def hashed(file: Path) -> str:
        state = file.stat()
        return hash_file(file, state.st_size, state.st_mtime_ns)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(hashed, files.values()), strict=True))


def local_folder(source: str, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint: itself, or the hub's in the local cache; None without either."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(source, "config.json", revision=revision)
    except ValueError:  # no valid hub id either
        return None
    return Path(config).parent if isinstance(config, str) else None


@functools.cache
def hash_file(file: Path, size: int, changed: int) -> str:
    """blake2b of a file's content; size and time of change are there for the cache."""
    whole = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()
