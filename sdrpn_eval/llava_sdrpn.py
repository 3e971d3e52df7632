"""The lmms-eval model `llava_sdrpn`: requests in, batches through ZoomModel, answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn_eval import tasks_info
from sdrpn_eval.arguments import WITHOUT_THRESHOLD, checked, on_command_line, stated
from sdrpn_eval.asking import Asker, Outcome, is_out_of_memory
from sdrpn_eval.data_access import check_data
from sdrpn_eval.harness_flags import (
    REFUSED,
    check_harness,
    refuse_fewshot_tasks,
    refuse_number_as_path,
    refuse_unsupported,
)
from sdrpn_eval.journal import Journal
from sdrpn_eval.kinds import Kind, Losses, Words, result
from sdrpn_eval.loading import TINY, load_engine, revisions, sources, zoom_settings
from sdrpn_eval.plugin import TaskIndex
from sdrpn_eval.questions import Documents, Request, ahead, batches, parse, question_text
from sdrpn_eval.ranks import ending_all
from sdrpn_eval.record import RUN_STAMP, RecordWriter, check_writable
from sdrpn_eval.run_facts import RunFacts, hash_ahead

AUTO_BATCH_SIZE = 32
"""Where `batch_size=auto` starts."""


class LlavaSdrpn(lmms):
    """LLaVA-1.5 with a second look. `arguments.ARGUMENTS` lists what `--model_args` takes.

    Raises ValueError that lists the arguments where one is unknown or ill-typed.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = given = stated(arguments)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = self.accelerator.device
        self.run_name = self._name_run()
        self._journal: Journal | None = None
        self._zooms: dict[str, ZoomConfig] = {}
        self._announced = False
        self._harness_checked = False
        with ending_all(self._world_size):
            refuse_number_as_path(on_command_line("--output_path", sys.argv))
            # Before anything else can fail, so that a gate sees that this run began.
            self._facts = self._begin_facts()
            self.arguments = values = checked(given)
            if values["system_prompt"]:
                values["system_prompt"] = self._resolve_system_prompt(values["system_prompt"])
            self._device = self._choose_device()
            auto = values["max_batch_size"] or AUTO_BATCH_SIZE
            self.batch_size = auto if values["batch_size"] == "auto" else values["batch_size"]
            check_harness(self._early_tasks(), main_process=self.accelerator.is_main_process)
            self._announce_early()
            self.engine = load_engine(values, given, self._device)
            if isinstance(self.engine, ZoomModel):
                # Noted in the record as it is, whoever decided it.
                values["padding"] = self.engine.backbone.preprocessing["padding"]
            self._zoom_settings = zoom_settings(self.engine, values, given)
            if self._facts is not None:
                self._start_hashing(self._facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> LlavaSdrpn:
        """Itself: lmms-eval's tracker copies the model it was given, weights and all, into text."""
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    def _choose_device(self) -> torch.device:
        device, device_map = self.arguments["device"], self.arguments["device_map"]
        if self._world_size > 1 and device_map in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map={device_map} spreads one model over all GPUs, but there are "
                f"{self._world_size} processes with a model each; leave device_map out"
            )
        if device is None or (self._world_size > 1 and device == "cuda"):
            return self.accelerator.device
        return torch.device(device)

    def _name_run(self) -> str:
        """A name that sorts by time and is the same on all ranks."""
        name = [datetime.now(UTC).strftime(RUN_STAMP)]
        broadcast_object_list(name)
        return name[0]

    # What lmms-eval calls

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer questions, in any order and mixture; answers come back in the order given."""
        with ending_all(self.world_size):
            parsed = parse(requests)
            return self._run(parsed, Words(parsed))

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Mean loss of each continuation and whether greedy decoding would give it."""
        with ending_all(self.world_size):
            return self._run(parse(requests), Losses(self._continuation))

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "llava_sdrpn answers single questions; tasks of several rounds "
            "(generate_until_multi_round) are not supported"
        )

    def _run(self, requests: list[Request], kind: Kind) -> list[GenerationResult]:
        self._announce(requests)
        documents = Documents(self.task_dict)
        results = {i: result(line) for i, line in self._earlier(requests, kind).items()}
        left = [r for r in requests if r.index not in results]
        asker = Asker(
            ask=lambda asked, questions: kind.ask(self.engine, asked, questions),
            ask_stock=lambda asked, questions: kind.ask(self._stock, asked, questions),
            nothing=kind.nothing,
            name=documents.name,
            on_error=self.arguments["on_error"],
            batch_size=self.batch_size,
            answered=bool(results),
        )
        groups = batches(left, self.batch_size, documents)
        progress_bar = tqdm(
            total=len(requests), initial=len(results), disable=self.rank != 0, desc="Questions"
        )
        with self._prefetched(groups, documents) as coming, progress_bar as progress:
            for batch, questions in coming:
                for outcomes in asker(batch, questions):
                    lines = [self._line(one, kind) for one in outcomes]
                    asked = [one.request for one in outcomes]
                    if self._journal is not None:
                        self._journal.keep(asked, lines)
                    for request, line in zip(asked, lines, strict=True):
                        results[request.index] = result(line)
                    progress.update(len(asked))
        self.batch_size = asker.batch_size
        if asker.failed:
            asker.tell_failed()
            if self._journal is not None:
                self._journal.facts.skip(asker.failed)
        return [results[i] for i in range(len(requests))]

    @contextmanager
    def _prefetched(
        self, groups: Iterable[list[Request]], documents: Documents
    ) -> Iterator[Iterator[tuple[list[Request], list[Question | Exception]]]]:
        """Batches with their questions, the next ones made in a thread; nothing of them is left
        in the end, however the run ends."""
        try:
            # Closed here and not some time later: its thread must have ended.
            with closing(ahead(groups, lambda r: self._question(r, documents))) as coming:
                yield coming
        finally:
            forget = getattr(self.engine, "forget_prepared", None)
            if forget is not None:
                forget()

    # One question

    def _question(self, request: Request, documents: Documents) -> Question | Exception:
        """A question ready to be asked, or why there is none; made in a thread of its own."""
        try:
            row = documents.row(request)
            images = documents.visuals(request, row)
            box = self._box(request, row) if self.arguments["proposer"] == "box" else None
            text = question_text(request, len(images))
            made = Question(text, images, box=box, zoom=self._zoom(request.task))
            _ = made.image_keys  # which decodes the images, if nothing did before
            self.engine.prepare([made])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return error
        return made

    @cached_property
    def _stock(self) -> ZoomModel:
        """The same model without a second look."""
        return ZoomModel(self.engine.backbone, proposer="none", prefix_cache=0)

    def _box(self, request: Request, row: Any) -> PixelBox:
        """The document's own box."""
        if "box" not in row:
            raise ValueError(f"proposer=box needs documents with a `box`; {request.task} has none")
        return PixelBox(*(int(v) for v in row["box"]))

    def _continuation(self, request: Request) -> str:
        target = request.extra
        if isinstance(target, str):
            return target
        return str(target(self.task_dict[request.task][request.split][request.doc_id]))

    def _zoom(self, task: str) -> ZoomConfig:
        """The zoom settings for a task: `threshold=`, or the one published for its family."""
        if task not in self._zooms:
            threshold = self.arguments["threshold"] or tasks_info.threshold_of(task)
            self._zooms[task] = replace(self._zoom_settings, threshold=threshold)
        return self._zooms[task]

    # What is said and written

    def _announce_early(self) -> None:
        """Say what will be scored before anything is fetched, where the command line tells."""
        if TaskIndex.latest is not None and self.accelerator.is_main_process:
            scored = tasks_info.scored_parts(self._early_tasks(), TaskIndex.latest)
            if scored:
                self._log_tasks(scored)
            check_data(scored, TaskIndex.latest)

    def _early_tasks(self) -> list[str]:
        """The tasks behind `--tasks`, as far as the command line and the index tell."""
        names = tasks_info.requested(sys.argv)
        index = TaskIndex.latest or {}
        return [task for n in names for task in (list(tasks_info.parts(n, index)) or [n])]

    def _announce(self, requests: Sequence[Request]) -> None:
        """Say once what will be scored, and with which thresholds; open the record."""
        tasks = {r.task: r.task_object for r in requests}
        if not self._announced and self.accelerator.is_main_process:
            metrics = {t: getattr(o, "aggregation", dict)() for t, o in tasks.items()}
            self._log_tasks({t: tasks_info.has_score(m) for t, m in metrics.items()})
        if self.rank == 0:
            self._log_thresholds([t for t in tasks if t not in self._zooms])
        # A model made in Python is older than the evaluation that asks it.
        for task in tasks.values():
            args = getattr(task, "args", None)
            refuse_unsupported({name: getattr(args, name, None) for name in REFUSED})
        if not self._harness_checked:
            told = bool(tasks_info.requested(sys.argv))
            check_harness(list(tasks), main_process=self.rank == 0 and not told)
            self._harness_checked = True
        refuse_fewshot_tasks(tasks.values())
        if self._journal is None:
            self._journal = self._open_journal(list(tasks.values()))
        if self._journal is not None:
            self._journal.facts.add(requests, self.task_dict)

    def _log_tasks(self, scored: dict[str, bool]) -> None:
        self._announced = True
        logger.info(tasks_info.describe(scored))
        strange = [t for t in scored if tasks_info.family(t) != "tiny_vstar"]
        if self.arguments["pretrained"] == TINY and strange:
            logger.warning(
                f"pretrained=tiny knows discs and patterns only: its scores on "
                f"{', '.join(strange)} say nothing about LLaVA-1.5"
            )

    def _log_thresholds(self, tasks: list[str]) -> None:
        if not tasks or self.arguments["proposer"] in WITHOUT_THRESHOLD:
            return

        def origin(task: str) -> str:
            if self.arguments["threshold"]:
                return "as given"
            return tasks_info.threshold_origin(task, self.arguments["proposer"])

        said = [f"{task} {self._zoom(task).threshold} ({origin(task)})" for task in tasks]
        logger.info(f"Thresholds: {', '.join(said)}")

    def _record_folder(self, outputs: Iterable[str | None]) -> Path | None:
        """`record=`, else `sdrpn_record` in one of lmms-eval's output folders; None for none."""
        given = self.arguments.get("record")
        if given is None:
            return next((Path(path) / "sdrpn_record" for path in outputs if path), None)
        if str(given).lower() not in ("none", "false"):
            return Path(str(given)).expanduser()
        if self.arguments.get("on_error", "raise") != "raise":
            raise ValueError(
                f"on_error={self.arguments['on_error']} needs a record, which tells what was "
                "skipped; leave record=none out"
            )
        return None

    def _open_journal(self, tasks: Sequence[Any]) -> Journal | None:
        args = [getattr(task, "args", None) for task in tasks]
        folder = self._record_folder([getattr(one, "output_path", None) for one in args])
        if folder is None:
            return None
        check_writable(folder)
        if self.rank == 0:
            logger.info(f"record of this run ({self.run_name}): {folder}")
        if self._facts is None or self._facts.folder != folder:  # not on the command line
            self._facts = self._new_facts(folder)
            self._start_hashing(self._facts)
        return Journal(
            RecordWriter(folder, self.run_name, self.rank),
            self._facts,
            sources(self.arguments),
            str(self.engine.backbone.dtype)
            if isinstance(self.arguments["pretrained"], str)
            else "",
        )

    def _begin_facts(self) -> RunFacts | None:
        """Write that this run began; None where no folder for its record is known by now."""
        folder = self._record_folder([on_command_line("--output_path", sys.argv)])
        if folder is None:
            return None
        check_writable(folder)
        facts = self._new_facts(folder)
        facts.write()
        return facts

    def _new_facts(self, folder: Path) -> RunFacts:
        ranks = (self._rank, self._world_size)
        return RunFacts(folder, self.run_name, *ranks, self.arguments, Future(), self._device)

    def _start_hashing(self, facts: RunFacts) -> None:
        """Begin to hash the weights: once they are loaded, their files are here and in memory."""
        values = self.arguments
        facts.arguments, facts.device = values, self._device
        facts.hashes = hash_ahead(sources(values), revisions(values))

    def _earlier(self, requests: list[Request], kind: Kind) -> dict[int, dict[str, Any]]:
        """The lines of earlier runs that answer some of the requests, by index."""
        journal = self._journal
        if journal is None or not self.arguments["resume"]:
            return {}
        return journal.earlier(requests, lambda r: journal.key(r, kind, self._zoom(r.task)))

    def _line(self, outcome: Outcome, kind: Kind) -> dict[str, Any]:
        """The record's line; `key` is what a later run finds it by, where it may."""
        request, question = outcome.request, outcome.question
        images = zip(question.image_keys, question.images, strict=True) if question else ()
        zoom = self._zoom(request.task)
        line = {
            "task": request.task,
            "split": request.split,
            "doc_id": request.doc_id,
            "images": [{"hash": key, "size": list(image.size)} for key, image in images],
            "prompt": question.text if question else request.prompt,
            "proposer": self.arguments["proposer"],
            "policy": zoom.policy,
            "threshold": zoom.threshold,
            **outcome.said.describe(),
        }
        if outcome.error is not None:
            return line | {"error": outcome.error}
        return line | {"key": self._journal.key(request, kind, zoom) if self._journal else None}
