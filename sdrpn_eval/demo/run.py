"""`make demo`: tiny_trio through lmms-eval, stock and with the second look, compared.

Leaves lmms-eval's own output folders with the records, the comparison as JSON, Markdown and a page,
and a contact sheet of eight questions.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sdrpn.draw import Card, sheet
from sdrpn_eval.report.html import write_comparison
from sdrpn_eval.report.text import show
from sdrpn_eval.results.comparison import Comparison
from sdrpn_eval.results.documents import TaskData, load_data
from sdrpn_eval.results.ladder import NAMES, Ladder, make_run

TASK, MODEL = "tiny_trio", "tiny-trio"
PROPOSERS = ("none", "rpn", "attention")
CARDS = 8


class Demo(Ladder):
    """The runs of the demo, in folders with the names that its table shows."""

    def folder(self, proposer: str) -> Path:
        return self.out / NAMES.get(proposer, proposer)


def contact_sheet(comparison: Comparison, data: TaskData, path: Path) -> None:
    """Draws questions that the second look changed, then others: image, box, crop, both answers.

    The comparison is of stock and the RPN, in this order, and possibly others.
    """
    stock, rpn = (one.run.tasks[TASK].samples for one in comparison.evidence[:2])
    looks = comparison.evidence[1].record.looks
    changed = [i for i in rpn if rpn[i].answer != stock[i].answer]
    chosen: dict[tuple[str, ...], int] = {}
    for i in [*changed, *rpn]:
        chosen.setdefault(looks[TASK, i].images, i)  # one question per image
    cards = []
    for i in list(chosen.values())[:CARDS]:
        look, image = looks[TASK, i], data.image(i)
        assert image is not None  # every document of the task shows one
        cards.append(
            Card(
                image,
                rpn[i].prompt,
                {"stock": stock[i].answer, "second look": rpn[i].answer, "right": rpn[i].target},
                look.regions,
                (0, 0, *image.size),  # scenes are square, so they are not padded
                look.roi_map,
                truth=data.box(i),
                note="pink: where it looked; green: the true box",
            )
        )
    sheet(cards, path, columns=2)


def demo(out: Path, *, batch_size: int = 32, limit: int | None = None) -> Comparison:
    """Evaluates every proposer, compares and draws. Raises RunFailed if one leaves no results."""
    console = Console()
    # Every question is asked, also in a folder of an earlier demo: the seconds are shown.
    plan = Demo(out, TASK, f"pretrained={MODEL},resume=False", limit, str(batch_size))
    runs = []
    for proposer in PROPOSERS:
        with console.status(f"lmms-eval --model {plan.model} --tasks {TASK}: proposer={proposer}"):
            run, seconds = make_run(plan, proposer)
        console.print(f"{run.name}: {seconds:.0f} s, {plan.folder(proposer)}", highlight=False)
        runs.append(run)
    data, notes = load_data([TASK])
    comparison, notes = write_comparison(runs, data, out / "comparison", notes=notes)
    show(comparison, notes, console)
    contact_sheet(comparison, data[TASK], out / "contact_sheet.png")
    console.print(
        f"{out / 'comparison.html'}, .md and .json and contact_sheet.png beside it", highlight=False
    )
    return comparison
