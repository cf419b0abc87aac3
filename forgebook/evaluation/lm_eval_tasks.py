"""Tasks of lm-evaluation-harness, before and after, by its own package: its prompts, its metrics, its scoring.

The chat template is on, as the model was trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.errors import ConfigError
from forgebook.evaluation import statistics
from forgebook.evaluation.results import Score
from forgebook.inference.generate import LoadedModel

__all__ = ["run_tasks"]


def run_tasks(
    told: Iterator[tuple[str, LoadedModel]], tasks: list[str], folder: str | None = None, rows: int | None = None
) -> list[Score]:
    """Run tasks on the base and the tuned model.

    told: (name, model), the base first. folder: holds YAMLs of tasks of one's own. rows: the first so many of each.

    Returns a score for each task and metric, tested row by row. Raises ConfigError without the package or the task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("lm_eval= needs the package lm-eval: pip install lm-eval (requirements-dev.txt)") from None
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"lm_eval_folder {folder} is not a folder of task YAMLs")
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"lm_eval: no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    found = []
    for _, loaded in told:
        if loaded.prompt_format is not None:
            raise ConfigError("lm_eval= prompts by chat templates, and this model was trained with a prompt_format")
        with loaded.active() as model:
            result = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=8), tasks=tasks, limit=rows,
                task_manager=manager, apply_chat_template=True, log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
        found.append(result["samples"])
        del loaded, model
    before, after = (_by_filter(samples) for samples in found)
    return [
        _score(f"{name} {metric}", metric, before[name], after[name])
        for name in before
        for metric in before[name][0]["metrics"]
        if isinstance(before[name][0][metric], int | float)
    ]


def _by_filter(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Part each task's samples by the filter that read the answer: GSM8K has a strict one and a flexible one."""
    parted: dict[str, list[dict[str, Any]]] = {}
    for task, of_task in samples.items():
        for one in of_task:
            name = task if one["filter"] == "none" else f"{task} {one['filter']}"
            parted.setdefault(name, []).append(one)
    return parted


def _score(name: str, metric: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Score:
    """Compare the values of one metric sample by sample."""
    columns = [
        np.array([float(one[metric]) for one in sorted(samples, key=lambda one: one["doc_id"])])
        for samples in (before, after)
    ]
    if all(np.isin(column, (0, 1)).all() for column in columns):
        return Score(name, *map(statistics.share, columns), statistics.compare_shares(*columns))
    return Score(name, *statistics.compare_statistics(np.mean, [columns[0]], [columns[1]]))
