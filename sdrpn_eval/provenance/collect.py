"""Collects what a run is made of, and writes it beside the run's record.

It is first written before the weights are loaded, so a run that died leaves its provenance and no
results: that is how a gate tells.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import torch

from sdrpn.io.atomic import write_json
from sdrpn.io.hub import local_folder
from sdrpn_eval.command_line import parse_arguments
from sdrpn_eval.provenance import fingerprints
from sdrpn_eval.provenance.model import ParsedArguments, Provenance, TaskFingerprints
from sdrpn_eval.requests import Request

PACKAGES = ("sdrpn", "lmms_eval", "torch", "torchvision", "transformers", "tokenizers")
PACKAGES += ("accelerate", "datasets", "numpy", "pillow", "scipy", "peft", "bitsandbytes")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
SETTINGS = ("*.json", "*.jinja", "tokenizer.model")
"""Files beside the weights that decide how they are used."""


@dataclass
class Collector:
    """The provenance of one process of a run; `add` as often as lmms-eval hands over requests.

    Attributes:
        run: Name of the run, the same on all ranks; names must sort by time.
        arguments: As resolved, defaults and all; as given until the model is loaded.
        hashes: As `hash_ahead` makes them; the file lists those of weights once they are there.
        model_args: The text of `--model_args`, where it is known.
        documents: Task -> document -> digest of its content.
        skipped: Task -> documents that were not answered as asked, see `on_error`.
    """

    folder: Path
    run: str
    rank: int
    world_size: int
    arguments: Mapping[str, Any]
    hashes: Future[dict[str, str]]
    device: torch.device
    model_args: str | None = None
    tasks: dict[str, TaskFingerprints] = field(default_factory=dict)
    documents: dict[str, dict[int, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    seeds: list[int] | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"run_facts_{self.run}_rank{self.rank}.json"

    def add(self, requests: Sequence[Request], task_dict: Mapping[str, Any]) -> None:
        """Write what is known, with the tasks of these requests.

        Args:
            task_dict: Task -> split -> rows, as the evaluator hands it to a model.
        """
        asked = [r for r in requests if not r.padding_only]
        for name in dict.fromkeys(r.task for r in asked):
            own = [r for r in asked if r.task == name]
            rows = task_dict[name][own[0].split]
            self.documents[name] = fingerprints.document_digests(rows, (r.doc_id for r in own))
            self.tasks[name] = _of_task(own, self.documents[name])
            # lmms-eval tells a model neither its seeds nor its command; its task objects know.
            cli = getattr(own[0].task_object, "args", None)
            self.seeds = self.seeds or getattr(cli, "seed", None)
            self.model_args = self.model_args or getattr(cli, "model_args", None)
        self.write()

    def skip(self, failed: Iterable[tuple[str, int]]) -> None:
        """Write that these documents, (task, document), were not answered as asked."""
        for task, _ in failed:
            self.skipped[task] = self.skipped.get(task, 0) + 1
        self.write()

    def write(self) -> None:
        """Write what is known by now."""
        write_json(self.path, self.content().model_dump())

    def content(self) -> Provenance:
        """What the file holds."""
        # One process tells; the others load the same files.
        known = self.rank == 0 and self.hashes.done()
        return Provenance(
            run=self.run,
            rank=self.rank,
            world_size=self.world_size,
            versions=versions(),
            source=source_state(),
            arguments={k: _plain(v) for k, v in self.arguments.items()},
            model_args=_parsed(self.model_args),
            seeds=self.seeds or {"torch": torch.initial_seed()},
            device=device_facts(self.device),
            weights=weights_only(self.hashes.result()) if known else {},
            tasks=self.tasks,
            skipped=self.skipped,
        )


def _parsed(model_args: Any) -> ParsedArguments | None:
    if not isinstance(model_args, str):
        return None
    return ParsedArguments(text=model_args, parsed=parse_arguments(model_args))


def _plain(value: Any) -> Any:
    """A model in memory has no content to write down here, only its kind."""
    known = isinstance(value, str | int | float | bool | None)
    return value if known else str(value) if isinstance(value, Path) else type(value).__name__


def _of_task(requests: Sequence[Request], documents: Mapping[int, int]) -> TaskFingerprints:
    task = requests[0].task_object
    has_scorer = hasattr(task, "config")
    return TaskFingerprints(
        documents=len(documents),
        data=fingerprints.total(documents.values()),
        prompts=fingerprints.prompts_fingerprint(requests),
        generation=fingerprints.generation_fingerprint(requests),
        scorer=fingerprints.scorer_fingerprint(task) if has_scorer else None,
        scorer_source=fingerprints.scorer_source_fingerprint(task) if has_scorer else None,
    )


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
    root = Path(__file__).resolve().parents[2]
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


def hash_ahead(
    sources: Mapping[str, str | None], revisions: Mapping[str, str | None] | None = None
) -> Future[dict[str, str]]:
    """`hash_sources` in a thread: gigabytes, needed when the first answers are written down."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
    try:
        return pool.submit(hash_sources, sources, revisions)
    finally:
        pool.shutdown(wait=False)


def hash_sources(
    sources: Mapping[str, str | None], revisions: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """blake2b of every file of weights or settings, by "what it is for/name of the file".

    sources: folders by what they are for (`pretrained`, `rpn`, `peft`); a hub id is looked up in
    the local cache. revisions: of hub ids, by the same names.
    """
    revisions = revisions or {}
    files = {
        f"{use}/{file.name}": file
        for use, source in sources.items()
        if source and (folder := local_folder(source, revisions.get(use)))
        for pattern in (*WEIGHTS, *SETTINGS)
        for file in sorted(folder.glob(pattern))
    }

    def hashed(file: Path) -> str:
        state = file.stat()
        return hash_file(file, state.st_size, state.st_mtime_ns)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(hashed, files.values()), strict=True))


def weights_only(hashes: Mapping[str, str]) -> dict[str, str]:
    """Of `hash_sources`, the files of weights."""
    return {
        name: value
        for name, value in hashes.items()
        if any(PurePath(name).match(pattern) for pattern in WEIGHTS)
    }


@functools.cache
def hash_file(file: Path, size: int, changed: int) -> str:
    """blake2b of a file's content; size and time of change are there for the cache."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
