"""The lmms-eval model `llava_sdrpn`: requests in, batches through ZoomLlava, answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from sdrpn.config import ZoomConfig
from sdrpn.region import PixelBox
from sdrpn.zoom import Answer, Question
from sdrpn_eval import tasks_info
from sdrpn_eval.arguments import checked
from sdrpn_eval.generation import translate
from sdrpn_eval.loading import TINY, load_engine, sources, zoom_settings
from sdrpn_eval.plugin import TaskIndex
from sdrpn_eval.questions import Documents, Request, ahead, batches, parse, question_text
from sdrpn_eval.record import RUN_STAMP, RecordWriter, describe_answer
from sdrpn_eval.run_facts import RunFacts

AUTO_BATCH_SIZE = 32
"""Where `batch_size=auto` starts; halved whenever the GPU's memory does not suffice."""


class LossAndGreedy(tuple):
    """(loss, greedy) as lmms-eval 0.7.3 can carry it.

    Its evaluator turns a plain pair into text, so the pair travels in a GenerationResult; its
    response cache would give text back, so `strip` (which it calls) says: nothing to store.
    """

    def strip(self) -> tuple[()]:
        return ()


class LlavaSdrpn(lmms):
    """LLaVA-1.5 with a second look. `arguments.ARGUMENTS` lists what `--model_args` takes.

    Raises ValueError that lists the arguments where one is unknown or ill-typed.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        given = {name: value for name, value in arguments.items() if value is not None}
        self.arguments = values = checked(given)
        if values["system_prompt"]:
            values["system_prompt"] = self._resolve_system_prompt(values["system_prompt"])
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = self._choose_device()
        auto = values["max_batch_size"] or AUTO_BATCH_SIZE
        self.batch_size = auto if values["batch_size"] == "auto" else values["batch_size"]
        self.run_name = self._name_run()
        self._record: RecordWriter | None = None
        self._facts: RunFacts | None = None
        self._zooms: dict[str, ZoomConfig] = {}
        self._announced = False
        self._announce_early()
        self.engine = load_engine(values, given, self._device)
        self._zoom_settings = zoom_settings(self.engine, values, given)

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

        def answer(batch: list[Request], questions: list[Question]) -> list[Any]:
            answers = self.engine.ask_batch(questions, generation=translate(batch[0].extra))
            self._write(batch, questions, answers)
            return [_result(a) for a in answers]

        return self._run(requests, answer)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Mean loss of each continuation and whether greedy decoding would give it.

        The loss and not its negative: lmms-eval's multiple-choice tasks take the smallest.
        """

        def score(batch: list[Request], questions: list[Question]) -> list[Any]:
            continuations = [self._continuation(r) for r in batch]
            scored = self.engine.loss_batch(questions, continuations)
            more = [
                {"continuation": c, "loss": loss, "greedy": greedy}
                for c, (loss, greedy, _) in zip(continuations, scored, strict=True)
            ]
            self._write(batch, questions, [answer for *_, answer in scored], more)
            return [GenerationResult(LossAndGreedy(pair[:2])) for pair in scored]  # type: ignore[arg-type]

        return self._run(requests, score)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "llava_sdrpn answers single questions; tasks of several rounds "
            "(generate_until_multi_round) are not supported"
        )

    def _run(self, instances: list[Any], answer: Callable[..., list[Any]]) -> list[Any]:
        requests = parse(instances)
        self._announce(requests)
        documents = Documents(self.task_dict)
        results: dict[int, Any] = {}

        def question(request: Request) -> Question:
            made = self._question(request, documents)
            self.engine.prepare([made])
            return made

        groups = batches(requests, self.batch_size, documents)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Questions") as progress:
            for batch, questions in ahead(groups, question):
                for request, result in self._answer_batch(batch, questions, answer):
                    results[request.index] = result
                    progress.update()
        return [results[i] for i in range(len(requests))]

    def _answer_batch(
        self, batch: list[Request], questions: list[Question], answer: Callable[..., list[Any]]
    ) -> list[tuple[Request, Any]]:
        """Answer a batch, in halves where `batch_size=auto` was too much for the GPU."""
        try:
            return list(zip(batch, answer(batch, questions), strict=True))
        except torch.OutOfMemoryError:
            if self.arguments["batch_size"] != "auto" or len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        self.batch_size = min(self.batch_size, half)
        logger.info(f"batch_size=auto: {len(batch)} questions do not fit, going on with {half}")
        first = self._answer_batch(batch[:half], questions[:half], answer)
        return first + self._answer_batch(batch[half:], questions[half:], answer)

    # One question

    def _question(self, request: Request, documents: Documents) -> Question:
        row = documents.row(request)
        images = documents.visuals(request, row)
        box = self._box(request, row) if self.arguments["proposer"] == "box" else None
        text = question_text(request, len(images))
        return Question(text, images, box=box, zoom=self._zoom(request.task))

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
        names = tasks_info.requested(sys.argv)
        if TaskIndex.latest is not None and names and self.accelerator.is_main_process:
            scored = tasks_info.scored_parts(names, TaskIndex.latest)
            if scored:
                self._log_tasks(scored)

    def _announce(self, requests: Sequence[Request]) -> None:
        """Say once what will be scored, and with which thresholds; open the record."""
        tasks = {r.task: r.task_object for r in requests}
        if not self._announced and self.accelerator.is_main_process:
            metrics = {t: getattr(o, "aggregation", dict)() for t, o in tasks.items()}
            self._log_tasks({t: tasks_info.has_score(m) for t, m in metrics.items()})
        if self.rank == 0:
            self._log_thresholds([t for t in tasks if t not in self._zooms])
        folder = self._record_folder(list(tasks.values()))
        if folder is not None and self._record is None:
            self._record = RecordWriter(folder, self.run_name, self.rank)
            self._facts = RunFacts(
                folder,
                self.run_name,
                self.rank,
                self.world_size,
                self.arguments,
                sources(self.arguments),
                self.device,
            )
            if self.rank == 0:
                logger.info(f"record of this run ({self.run_name}): {folder}")
        if self._facts is not None:
            self._facts.add(requests, self.task_dict)

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
        if not tasks or self.arguments["proposer"] in ("none", "box", "vicrop"):
            return

        def origin(task: str) -> str:
            if self.arguments["threshold"]:
                return "as given"
            source = tasks_info.family(task)
            return f"as published for {source}" if source else "as none is published for it"

        said = [f"{task} {self._zoom(task).threshold} ({origin(task)})" for task in tasks]
        logger.info(f"Thresholds: {', '.join(said)}")

    def _record_folder(self, tasks: list[Any]) -> Path | None:
        """`record=`, else `sdrpn_record` beside lmms-eval's own output; None for no record."""
        folder = self.arguments["record"]
        if folder is not None:
            return None if str(folder).lower() in ("none", "false") else Path(str(folder))
        outputs = {getattr(getattr(task, "args", None), "output_path", None) for task in tasks}
        paths = [Path(path) / "sdrpn_record" for path in outputs if path]
        return paths[0] if paths else None

    def _write(
        self,
        batch: list[Request],
        questions: list[Question],
        answers: list[Answer],
        more: list[dict[str, Any]] | None = None,
    ) -> None:
        if self._record is None:
            return
        extras = more or [{} for _ in batch]
        lines = zip(batch, questions, answers, extras, strict=True)
        self._record.append(
            self._line(request, question, answer) | extra
            for request, question, answer, extra in lines
            if not request.padding_only
        )

    def _line(self, request: Request, question: Question, answer: Answer) -> dict[str, Any]:
        return {
            "task": request.task,
            "split": request.split,
            "doc_id": request.doc_id,
            "images": [
                {"hash": key, "size": list(image.size)}
                for key, image in zip(question.image_keys, question.images, strict=True)
            ],
            "prompt": question.text,
            "proposer": self.arguments["proposer"],
            "policy": self._zoom(request.task).policy,
            "threshold": self._zoom(request.task).threshold,
            **describe_answer(answer),
        }


def _result(answer: Answer) -> GenerationResult:
    prompt_tokens = answer.image_tokens + answer.crop_tokens + answer.question_tokens
    return GenerationResult(answer.text, TokenCounts(prompt_tokens, answer.new_tokens))
