"""`sdrpn-eval replay`: one question of a run, repeated and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import report_errors, say
from sdrpn_eval.cli.options import IncludePathOption, model_args_option

if TYPE_CHECKING:
    from sdrpn_eval.results.replay import Look, Replay


def replay(
    run: Annotated[
        Path,
        typer.Argument(
            help="Output folder of a llava_sdrpn run, one of its *_results.json files, or its "
            "record."
        ),
    ],
    doc: Annotated[str, typer.Option(help="TASK:ID, such as tiny_vstar:17.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; default: replay/TASK_ID.")
    ] = None,
    model_args: Annotated[str, model_args_option(", in place of the run's.")] = "",
    include_path: IncludePathOption = None,
) -> None:
    """Ask one question of a run again and show what was seen, then and now.

    Loads the model with the run's own arguments. Says whether the answer is the recorded one and
    what has changed since: weights, versions, arguments, device, prompt, image.

      sdrpn-eval replay out/rpn --doc tiny_vstar:17

      sdrpn-eval replay out/rpn --doc tiny_vstar:17 --model_args proposer=attention,threshold=0.1
    """
    with report_errors():
        task, _, number = doc.rpartition(":")
        if not task or not (number.isascii() and number.isdecimal()):
            raise ValueError(f"--doc must be TASK:ID, such as tiny_vstar:17, got {doc!r}")
        # Imported here, so that --help answers at once.
        from sdrpn_eval.results.documents import task_manager
        from sdrpn_eval.results.replay import ask_again
        from sdrpn_eval.results.responses import read_source

        source = read_source(run, [task])
        folder = out or Path("replay") / f"{task}_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        manager = task_manager(include_path or source.include_path)
        done = ask_again(source, (task, int(number)), model_args, manager, folder)
        for line in _summary(done):
            say(line)
        say(f"pictures: {folder / 'replay.png'}, replay.json beside it")


def _summary(done: Replay) -> list[str]:
    lines = [f"question: {done.prompt}"]
    if done.target is not None:
        lines.append(f"right: {done.target}")
    lines += [f"{name}: {_look(look)}" for name, look in (("then", done.then), ("now", done.now))]
    lines.append(f"the answer is {'the recorded one' if done.same else 'another one'}")
    if done.moved:
        lines += [f"moved: {sentence}" for sentence in done.moved]
    elif not done.same:
        lines.append(
            "nothing that was recorded has moved; in half precision an answer can change with the "
            "neighbours in its batch"
        )
    return lines


def _look(look: Look) -> str:
    boxes = ", ".join(str(tuple(box)) for box in look.regions) or f"nowhere ({look.reason})"
    return f"{look.answer!r}, looked at {boxes}"
