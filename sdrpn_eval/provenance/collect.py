"""Collects the provenance of a run and writes it next to the run's record.

It is first written before the weights are loaded: a crashed run leaves its provenance and no
results, by which the gate recognises it.
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
from sdrpn_eval.command_line import from_evaluator, parse_arguments
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
    """Collects the provenance of one process of a run, see `Provenance`.

    Attributes:
        folder: Where it is written.
        hashes: From `hash_in_background`.
        model_args: The text of `--model_args`, if known.
        documents: Digests of documents by task and document id.
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
    evaluations: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"run_facts_{self.run}_rank{self.rank}.json"

    def add(self, requests: Sequence[Request], task_dict: Mapping[str, Any]) -> None:
        """Adds the tasks of requests, and writes; called for each batch of requests by lmms-eval.

        `task_dict` holds rows by task and split, as the evaluator passes them to a model.
        """
        asked = [r for r in requests if not r.padding_only]
        for name in dict.fromkeys(r.task for r in asked):
            own = [r for r in asked if r.task == name]
            rows = task_dict[name][own[0].split]
            self.documents[name] = fingerprints.document_digests(rows, (r.doc_id for r in own))
            self.tasks[name] = _of_task(own, self.documents[name])
            # lmms-eval passes a model neither its seeds nor its command; task objects hold both.
            cli = getattr(own[0].task_object, "args", None)
            self.seeds = self.seeds or getattr(cli, "seed", None)
            self.model_args = self.model_args or getattr(cli, "model_args", None)
        date = from_evaluator().get("datetime_str")
        if date is not None and date not in self.evaluations:
            self.evaluations.append(date)
        self.write()

    def skip(self, failed: Iterable[tuple[str, int]]) -> None:
        """Counts documents, (task, document id), that were not answered as asked, and writes."""
        for task, _ in failed:
            self.skipped[task] = self.skipped.get(task, 0) + 1
        self.write()

    def write(self) -> None:
        """Writes what is known by now."""
        write_json(self.path, self.content().model_dump())

    def content(self) -> Provenance:
        """What the file holds."""
        # Only rank 0 lists the hashes; the others load the same files.
        known = self.rank == 0 and self.hashes.done()
        text, model_args = self.model_args, None
        if isinstance(text, str):
            model_args = ParsedArguments(text=text, parsed=parse_arguments(text))
        return Provenance(
            run=self.run,
            rank=self.rank,
            world_size=self.world_size,
            versions=versions(),
            source=source_state(),
            arguments={k: _plain(v) for k, v in self.arguments.items()},
            model_args=model_args,
            seeds=self.seeds or {"torch": torch.initial_seed()},
            device=device_facts(self.device),
            weights=weights_only(self.hashes.result()) if known else {},
            tasks=self.tasks,
            skipped=self.skipped,
            evaluations=self.evaluations,
        )


def _plain(value: Any) -> Any:
    """A value that JSON can hold; a model in memory becomes the name of its class."""
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
    """Versions of Python and of the installed packages in PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, such as +cu128
    return found


def source_state() -> dict[str, Any] | None:
    """Commit of the checkout that sdrpn runs from, and whether it is modified; None in a wheel."""
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
    """Type, name and number of the devices, and the platform."""
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


def hash_in_background(
    sources: Mapping[str, str | None], revisions: Mapping[str, str | None] | None = None
) -> Future[dict[str, str]]:
    """Runs `hash_sources` in a thread: it reads gigabytes, and is needed at the first answer."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
    try:
        return pool.submit(hash_sources, sources, revisions)
    finally:
        pool.shutdown(wait=False)


def hash_sources(
    sources: Mapping[str, str | None], revisions: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """Hashes every file of weights or settings: blake2b digests by "use/file name".

    Args:
        sources: Folders or Hub ids by use (`pretrained`, `rpn`, `peft`); a Hub id is looked up in
            the local cache.
        revisions: Of Hub ids, by use.
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
    """Selects the files of weights from the result of `hash_sources`."""
    return {
        name: value
        for name, value in hashes.items()
        if any(PurePath(name).match(pattern) for pattern in WEIGHTS)
    }


@functools.cache
def hash_file(file: Path, size: int, changed: int) -> str:
    """blake2b of a file's content; size and modification time are part of the cache's key."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
