"""`sdrpn answer`: answer a file of questions in bulk, without lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn import model_registry as names
from sdrpn.cli.shared import (
    DtypeOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    PaddingOption,
    PolicyOption,
    ProposerOption,
    RpnOption,
    RpnRevisionOption,
    ThresholdOption,
    check_images,
    load_zoom,
    report_errors,
    say,
    weights_hint,
)
from sdrpn.io.plurals import counted

SOME_FAILED = 1
"""Exit code if `--on-error empty` wrote errors."""


def answer(
    questions: Annotated[
        Path,
        typer.Argument(
            help="JSON lines or a JSON list with `id`, `image`, `question` and any other fields; "
            "or LLaVA's `question_id`, `image`, `text`."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image paths start from.")],
    out: Annotated[
        Path, typer.Option(help="JSON lines, one per answer; resumes if the file exists.")
    ],
    model: ModelOption = names.LLAVA_7B,
    rpn: RpnOption = None,
    rpn_revision: RpnRevisionOption = None,
    proposer: ProposerOption = "rpn",
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    batch_size: Annotated[
        int, typer.Option(help="Questions per batch; halved if they do not fit.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    on_error: Annotated[
        str,
        typer.Option(
            help="If a question cannot be answered: `raise` stops, `empty` writes the error as its "
            "line and continues."
        ),
    ] = "raise",
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Answer a file of questions about images, each with a second look.

    Example: sdrpn answer questions.jsonl --images photos/ --out answers.jsonl

    If interrupted, the same command resumes and asks nothing twice. Exit code 0: all questions are
    answered; 1: --on-error empty wrote errors, which the next such command asks again; 2: an error
    stopped it.
    """
    with report_errors():
        check_images(images)
        # Imported here to keep --help and path errors fast.
        from sdrpn.io.questions import read_questions

        asked = read_questions(questions, images)
    with report_errors(weights_hint(model)):
        from sdrpn.batch_inference import AnswerFile, check_options

        check_options(batch_size, max_new_tokens, on_error)
        file = AnswerFile(out)
        zoom = load_zoom(
            *(model, rpn, proposer, threshold, policy, dtype),
            padding=padding,
            rpn_revision=rpn_revision,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
    with report_errors():
        from sdrpn.batch_inference import AnswerJob

        job = AnswerJob(
            zoom,
            asked,
            images,
            file,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_error=on_error,
        )
        lines = job.run().values()
    failed = [line for line in lines if "error" in line]
    zoomed = sum(bool(line.get("regions")) for line in lines)
    say(
        f"{len(lines) - len(failed)} of {counted(len(lines), 'question')} answered, {zoomed} "
        "with a zoom"
    )
    say(f"answers: {out}")
    if failed:
        say(f"{len(failed)} could not be answered, such as {failed[0]['id']!r}:")
        say(f"  {failed[0]['error']}")
        raise typer.Exit(SOME_FAILED)
