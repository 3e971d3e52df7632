"""The lmms-eval models: take requests, run batches through ZoomModel, return answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from loguru import logger

from sdrpn.boxes import PixelBox
from sdrpn.config import ONE_WORD, PEAK, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.resumable import BatchRunner
from sdrpn_eval import tasks_info
from sdrpn_eval.announce import Announcer
from sdrpn_eval.args import LlavaArguments, ModelArguments, QwenArguments, stated
from sdrpn_eval.command_line import on_command_line
from sdrpn_eval.harness import check_harness, refuse_number_as_path, refuse_task_settings
from sdrpn_eval.journal import Journal
from sdrpn_eval.loading import load_engine, zoom_settings
from sdrpn_eval.on_error import Failures, ending_all
from sdrpn_eval.provenance.model import RUN_STAMP
from sdrpn_eval.record import RecordLine
from sdrpn_eval.request_types import Fields, GenerateUntil, Loglikelihood, RequestType, result
from sdrpn_eval.requests import Documents, Request, batches, parse, question_text
from sdrpn_eval.run_record import RunRecord

AUTO_BATCH_SIZE = 32
"""Initial batch size of `batch_size=auto`."""


class SdrpnModel(lmms):
    """A vision-language model with a second look, as an lmms-eval model.

    There is one subclass per model family, which names the class of its `--model_args`.

    Args:
        arguments: `--model_args` by name, see `args.ModelArguments`.

    Raises:
        ValueError: If arguments are unknown or ill-typed; lists them.
    """

    is_simple = True
    argument_class: ClassVar[type[ModelArguments]]
    arguments: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        given = stated(arguments, self.argument_class)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = self.accelerator.device
        self._record = RunRecord(self._name_run(), self._rank, self._world_size)
        self._zooms: dict[str, ZoomConfig] = {}
        self._harness_checked = False
        with ending_all(self._world_size):
            refuse_number_as_path(on_command_line("--output_path", sys.argv))
            # Before anything else can fail, so that the gate sees that this run began.
            self._record.begin(given, self._device)
            args: Any = self.argument_class.of(given)
            self.arguments = args
            if args.system_prompt:  # may name a file
                args.system_prompt = self._resolve_system_prompt(args.system_prompt)
            self._device = self._choose_device()
            self.batch_size = AUTO_BATCH_SIZE if args.batch_size == "auto" else args.batch_size
            self._announcer = Announcer(args, main_process=self.accelerator.is_main_process)
            tasks = self._announcer.early_tasks()
            check_harness(tasks, main_process=self.accelerator.is_main_process)
            self._announcer.announce_early(tasks)
            self.engine = load_engine(args, self._device)
            if isinstance(self.engine, ZoomModel):
                # Recorded as used, whether given, preset or read from the checkpoint.
                args.note(self.engine.backbone.preprocessing)
            self._zoom_settings = zoom_settings(self.engine, args)
            self._record.loaded(args, self._device)

    def __deepcopy__(self, memo: dict[int, Any]) -> SdrpnModel:
        """Returns itself: lmms-eval's tracker copies the model, with its weights, into text."""
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    def _choose_device(self) -> torch.device:
        device, device_map = self.arguments.device, self.arguments.device_map
        if self._world_size > 1 and device_map in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map={device_map} spreads one model over all GPUs, but there are "
                f"{self._world_size} processes with a model each; leave device_map out"
            )
        if device is None or (self._world_size > 1 and device == "cuda"):
            return self.accelerator.device
        return torch.device(device)

    def _name_run(self) -> str:
        """A name that is the same on all ranks; names sort by time."""
        name = [datetime.now(UTC).strftime(RUN_STAMP)]
        broadcast_object_list(name)
        return name[0]

    # What lmms-eval calls

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers requests of any tasks; returns the answers in the order of the requests."""
        with ending_all(self.world_size):
            parsed = parse(requests)
            return self._run(parsed, GenerateUntil(parsed))

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Returns each continuation's mean loss and whether greedy decoding would produce it."""
        with ending_all(self.world_size):
            return self._run(parse(requests), Loglikelihood(self._continuation))

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            f"{self.argument_class.model_name} answers single questions; tasks of several rounds "
            "(generate_until_multi_round) are not supported"
        )

    def _run(self, requests: list[Request], kind: RequestType) -> list[GenerationResult]:
        journal = self._open_journal(requests)
        documents = Documents(self.task_dict)
        lines: dict[int, RecordLine] = {}
        if journal is not None and self.arguments.resume:
            lines = journal.earlier(requests, lambda r: self._key(r, kind))
        failures = Failures(self.arguments.on_error)
        runner = self._runner(documents, kind, failures, resumed=bool(lines))
        left = [r for r in requests if r.index not in lines]
        progress = {"total": len(requests), "initial": len(lines), "disable": self.rank != 0}
        waiting = runner(batches(left, self.batch_size, documents), desc="Questions", **progress)
        try:
            # Closed here rather than by the garbage collector: its threads must have ended.
            with closing(waiting) as results:
                for done in results:
                    if journal is not None:
                        journal.keep(done)
                    lines |= {request.index: line for request, line in done}
        finally:
            self.engine.forget_prepared()
        self.batch_size = runner.batch_size
        if failures.reasons:
            failures.report()
            if journal is not None:
                journal.provenance.skip(failures.reasons)
        return [result(lines[i]) for i in range(len(requests))]

    def _runner(
        self, documents: Documents, kind: RequestType, failures: Failures, *, resumed: bool
    ) -> BatchRunner[Request, Question, RecordLine]:
        def ask(asked: Sequence[Request], questions: Sequence[Question]) -> list[RecordLine]:
            answers = kind.ask(self.engine, asked, questions)
            return [
                self._line(r, q, fields, key=self._key(r, kind))
                for r, q, fields in zip(asked, questions, answers, strict=True)
            ]

        def recover(request: Request, question: Question | None, error: Exception) -> RecordLine:
            document, name = (request.task, request.doc_id), lambda: documents.name(request)
            why = failures.add(document, name, error, answered=runner.succeeded)
            if self.arguments.on_error == "stock" and question is not None:
                plain = replace(question, box=None)
                done = runner.attempt(
                    lambda *asked: kind.ask(self._stock, *asked),  # type: ignore[arg-type]
                    [(request, plain)],
                )
                if isinstance(done, list):
                    fields: Any = done[0][1]
                    fields = {**fields, "no_zoom": "the second look failed"}
                    return self._line(request, question, fields, error=why)
            return self._line(request, question, kind.unanswered(request), error=why)

        runner = BatchRunner(
            prepare=lambda request: self._question(request, documents),
            run=ask,
            recover=recover,
            describe=lambda r: f"{documents.name(r)}, with a prompt of {len(r.prompt)} characters,",
            batch_size=self.batch_size,
            remedy="give a smaller prefix_cache or crop_tokens",
            strict=self.arguments.on_error == "raise",
            succeeded=resumed,
            warn=logger.warning,
        )
        return runner

    # One question

    def _question(self, request: Request, documents: Documents) -> Question:
        """Makes a question, decoded and preprocessed; runs in the prefetch thread."""
        row = documents.row(request)
        images = documents.visuals(request, row)
        box = self._box(request, row) if self.arguments.proposer == "box" else None
        text = self._question_text(request, len(images))
        made = Question(text, images, box=box, zoom=self._zoom(request.task))
        _ = made.image_keys  # decodes the images here, in this thread
        self.engine.prepare([made])
        return made

    def _question_text(self, request: Request, images: int) -> str:
        """The task's prompt in the form that the family's engine takes."""
        return question_text(request, images)

    @cached_property
    def _stock(self) -> ZoomModel:
        """The same backbone without a second look."""
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
        """The zoom settings for a task, with `threshold=` or the published threshold."""
        if task not in self._zooms:
            threshold = self.arguments.threshold or self.published_threshold(task)[0]
            self._zooms[task] = replace(self._zoom_settings, threshold=threshold)
        return self._zooms[task]

    def published_threshold(self, task: str) -> tuple[float | str, str]:
        """The threshold published for a task's family, and its origin in words."""
        origin = tasks_info.threshold_origin(task, self.arguments.proposer)
        own = self._zoom_settings.threshold
        if tasks_info.family(task) is None and own == PEAK:
            return own, origin  # the RPN's own rule serves every task
        return tasks_info.threshold_of(task), origin

    def _key(self, request: Request, kind: RequestType) -> str | None:
        """The key by which a later run finds the request's line."""
        journal = self._record.journal
        return None if journal is None else journal.key(request, kind, self._zoom(request.task))

    def _line(
        self, request: Request, question: Question | None, fields: Fields, **more: str | None
    ) -> RecordLine:
        images = zip(question.image_keys, question.images, strict=True) if question else ()
        zoom = self._zoom(request.task)
        return RecordLine.model_validate(
            {
                "run": self._record.run,
                "task": request.task,
                "split": request.split,
                "doc_id": request.doc_id,
                "images": [{"hash": key, "size": image.size} for key, image in images],
                "prompt": question.text if question else request.prompt,
                "proposer": self.arguments.proposer,
                "policy": zoom.policy,
                "threshold": zoom.threshold,
                **fields,
                **more,
            }
        )

    # The record

    def _open_journal(self, requests: Sequence[Request]) -> Journal | None:
        """Logs what will be scored, refuses unsupported settings, and opens the record."""
        tasks = {r.task: r.task_object for r in requests}
        fresh = [task for task in tasks if task not in self._zooms]
        given = self.arguments.threshold
        thresholds = {
            task: (given, "as given") if given else self.published_threshold(task) for task in fresh
        }
        self._announcer.announce(tasks, thresholds)
        for task in fresh:
            self._zoom(task)
        # A model made in Python exists before the evaluation and its settings.
        refuse_task_settings(tasks.values())
        if not self._harness_checked:
            told = bool(tasks_info.requested(sys.argv))
            check_harness(list(tasks), main_process=self.rank == 0 and not told)
            self._harness_checked = True
        in_memory = not isinstance(self.arguments.pretrained, str)
        dtype = "" if in_memory else str(self.engine.backbone.dtype)
        journal = self._record.open(tasks.values(), self.arguments, self._device, dtype)
        if journal is not None:
            journal.provenance.add(requests, self.task_dict)
        return journal


class LlavaSdrpn(SdrpnModel):
    """LLaVA-1.5 with a second look."""

    argument_class = LlavaArguments


class Qwen2_5_VLSdrpn(SdrpnModel):
    """Qwen2.5-VL with a second look."""

    argument_class = QwenArguments
    arguments: QwenArguments

    def _question_text(self, request: Request, images: int) -> str:
        text = super()._question_text(request, images)
        add = self.arguments.short_answer and ONE_WORD not in text
        return f"{text}\n{ONE_WORD}" if add else text

    def published_threshold(self, task: str) -> tuple[float | str, str]:
        """The threshold published for the model's size, the task's benchmark and the image size."""
        shape = self.engine.backbone.text_config
        limits = self.arguments.min_pixels, self.arguments.max_pixels
        return tasks_info.qwen_threshold(task, shape.hidden_size, shape.num_hidden_layers, *limits)


MODEL_CLASSES: dict[str, type[SdrpnModel]] = {
    one.argument_class.model_name: one for one in (LlavaSdrpn, Qwen2_5_VLSdrpn)
}
"""Model classes by their name in lmms-eval."""
