"""Runs lmms-eval's evaluator with the settings of an earlier run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.utils import get_datetime_str

from sdrpn_eval.results.documents import quiet
from sdrpn_eval.results.read import TIMEZONE, BadRun


def evaluate_again(
    model: Any,
    names: Sequence[str],
    config: Mapping[str, Any],
    manager: Any,
    out: Path,
    **changes: Any,
) -> dict[str, Any]:
    """Calls lmms-eval's `simple_evaluate` with the settings of a recorded run.

    Args:
        model: A model of lmms-eval.
        names: Tasks and groups.
        config: `config` of the run's results.
        manager: lmms-eval's index of tasks.
        out: Folder in which tasks write files of their own, such as submissions.
        **changes: Settings that replace the recorded ones.

    Raises:
        BadRun: If the run cannot be repeated.
    """
    cli = config.get("resolved_cli_args") or {}
    if cli.get("apply_chat_template"):
        raise BadRun("the run was made with --apply_chat_template: its prompts need its own model")
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise BadRun(
            f"lmms-eval knows no task {', '.join(unknown)}; give --include_path FOLDER of its YAML"
        )
    # Without a command line, lmms-eval keeps images and strips no reasoning tags.
    own = {"process_with_media": True, "reasoning_tags": None} | dict(cli)
    settings = {
        "model_args": config.get("model_args"),
        "num_fewshot": cli.get("num_fewshot"),
        "limit": config.get("limit"),
        "offset": config.get("offset") or 0,
        "system_instruction": cli.get("system_instruction"),
        "gen_kwargs": cli.get("gen_kwargs"),
        "repeats": cli.get("repeats") or 1,
        "random_seed": config.get("random_seed", 0),
        "numpy_random_seed": config.get("numpy_seed", 1234),
        "torch_random_seed": config.get("torch_seed", 1234),
        "fewshot_random_seed": config.get("fewshot_seed", 1234),
        "bootstrap_iters": config.get("bootstrap_iters", 0),
        "datetime_str": get_datetime_str(timezone=cli.get("timezone") or TIMEZONE),
        "cli_args": Namespace(**own | {"output_path": str(out)}),
        "task_manager": manager,
    }
    with quiet():
        results = simple_evaluate(model, tasks=list(names), **settings | changes)
    if results is None:
        raise BadRun("lmms-eval returned no results; run this in a single process")
    return results
