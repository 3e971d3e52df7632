"""`sdrpn answer`: one's own questions in bulk, without the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn import model_registry as names
from sdrpn.cli.shared import (
    DtypeOption,
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
"""Exit code where --on-error empty passed over questions."""


def answer(
    questions: Annotated[
        Path,
        typer.Argument(
            help="JSON lines or a JSON list: `id`, `image`, `question`, and what else you like; or "
            "LLaVA's `question_id`, `image`, `text`."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image paths start from.")],
    out: Annotated[
        Path, typer.Option(help="JSON lines, one an answer; a begun file is gone on with.")
    ],
    model: ModelOption = names.LLAVA_7B,
    rpn: RpnOption = None,
    rpn_revision: RpnRevisionOption = None,
    proposer: ProposerOption = "rpn",
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    on_error: Annotated[
        str,
        typer.Option(
            help="A question that cannot be answered: `raise` ends there, `empty` notes the error "
            "as its line and goes on."
        ),
    ] = "raise",
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
) -> None:
    """Answer a file of questions about images, each with a second look.

    Example: sdrpn answer questions.jsonl --images photos/ --out answers.jsonl

    Stopped at any moment, the same command goes on where it was and asks nothing twice. It ends
    with 0 where all are answered, with 1 where --on-error empty noted errors (asked again by the
    next such command), with 2 where something stopped it.
    """
    with report_errors():
        check_images(images)
        # Imported here, so that --help and a wrong path answer at once.
        from sdrpn.io.questions import read_questions

        asked = read_questions(questions, images)
    with report_errors(weights_hint(model)):
        from sdrpn.batch_inference import AnswerFile, check_options

        check_options(batch_size, max_new_tokens, on_error)
        file = AnswerFile(out)
        zoom = load_zoom(model, rpn, proposer, threshold, policy, dtype, padding, rpn_revision)
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
