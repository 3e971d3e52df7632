"""`sdrpn-eval subsets`: CI subsets chosen anew, or cut out of their data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrpn.cli.shared import report_errors
from sdrpn.io.plurals import counted
from sdrpn_eval.cli.options import split_names

if TYPE_CHECKING:
    from sdrpn_eval.subsets import Subset

app = typer.Typer(
    no_args_is_help=True,
    help="CI subsets: fixed documents of a benchmark, the same for everyone, as ids in a file.",
)
TasksOption = Annotated[str, typer.Option(help="Which, comma-separated; default: all.")]


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="Folder for the files of ids.")],
    tasks: TasksOption = "",
    count: Annotated[int, typer.Option(help="Documents of each.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Another one, another subset.")] = 0,
    by: Annotated[
        str, typer.Option(help="A column to stratify by; loads the data (SDRPN_DATA works).")
    ] = "",
) -> None:
    """Choose documents and write their ids.

    sdrpn-eval subsets make --out tasks/ci/ids

    sdrpn-eval subsets make --out mine --tasks chartqa_ci --by type
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.subsets import make_subset

        for task in _known(tasks):
            if by:
                chosen = _by_column(task, by, count, seed)
            else:
                chosen = make_subset(task, count=count, seed=seed)
            typer.echo(f"{chosen.save(out)}: {len(chosen.ids)} of {chosen.rows}, {chosen.strata}")


@app.command()
def cut(
    out: Annotated[Path, typer.Option(help="Folder for `<task>/<split>-00000-of-00001.parquet`.")],
    tasks: TasksOption = "",
) -> None:
    """Write the rows of subsets as files, for a machine that shall not fetch whole data sets.

      sdrpn-eval subsets cut --out ci-data

    Then, there: SDRPN_DATA=ci-data lmms-eval ... --tasks sdrpn_ci
    """
    with report_errors():
        for task in _known(tasks):
            loaded = load_task(task)
            path = out / task / f"{loaded.config.test_split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            loaded.eval_docs.to_parquet(str(path))
            typer.echo(f"{path}: {counted(len(loaded.eval_docs), 'row')}")


def _known(tasks: str) -> list[str]:
    from sdrpn_eval.subsets import names

    wanted = split_names(tasks) or names()
    unknown = [name for name in wanted if name not in names()]
    if unknown:
        raise ValueError(f"there is no subset {unknown[0]}, only {', '.join(names())}")
    return wanted


def _by_column(task: str, column: str, count: int, seed: int) -> Subset:
    from sdrpn_eval.subsets import Subset, read_subset, stratified_ids

    source = read_subset(task).source
    rows = load_task(source).eval_docs_no_media
    if column not in rows.column_names:
        raise ValueError(f"{task} has no column {column}, only {', '.join(rows.column_names)}")
    labels = [json.dumps(value, sort_keys=True) for value in rows[column]]
    ids = stratified_ids(labels, count, seed, task)
    strata = f"{counted(len(set(labels)), 'value')} of {column}, in proportion"
    return Subset(task, source, len(labels), seed, strata, ids)


def load_task(name: str) -> Any:
    """lmms-eval's task, with its data. Raises ValueError that says what kept it from loading."""
    from sdrpn_eval.results.documents import load_data

    found, notes = load_data([name])
    if name not in found:
        raise ValueError("; ".join(notes))
    return found[name].task
