"""Tasks of lm-evaluation-harness, before and after, by its own package: its prompts, its metrics, its scoring.

Prompts use the chat template, with which the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.errors import ConfigError
from forgebook.evaluation import statistics
from forgebook.evaluation.results import Score, share_score, statistic_score
from forgebook.inference.loading import LoadedModel

__all__ = ["run_tasks"]


def run_tasks(
    models: Iterator[tuple[str, LoadedModel]], tasks: list[str], folder: str | None = None, limit: int | None = None
) -> list[Score]:
    """Run tasks on the base and the tuned model.

    models: (name, model), the base first. folder: of YAMLs with your own tasks. limit: the first examples of each task.

    Returns a score for each task and metric, compared example by example. Raises ConfigError without the package, for
    an unknown task, and for a model with a prompt_format.
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
    samples = []
    for _, loaded in models:
        if loaded.prompt_format is not None:
            raise ConfigError("lm_eval= prompts with chat templates, and this model was trained with a prompt_format")
        with loaded.active() as model:
            result = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=8),
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                apply_chat_template=True,
                log_samples=True,
                bootstrap_iters=0,
            )
        samples.append(result["samples"])
        del loaded, model
    before, after = map(_by_filter, samples)
    return [
        _score(f"{name} {metric}", metric, before[name], after[name])
        for name in before
        for metric in before[name][0]["metrics"]
        if isinstance(before[name][0][metric], int | float)
    ]


def _by_filter(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Group each task's samples by the filter that read the answer: GSM8K has a strict one and a flexible one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for task, of_task in samples.items():
        for one in of_task:
            name = task if one["filter"] == "none" else f"{task} {one['filter']}"
            groups.setdefault(name, []).append(one)
    return groups


def _score(name: str, metric: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Score:
    """Compare the values of one metric sample by sample."""
    first, second = (
        np.array([float(one[metric]) for one in sorted(samples, key=lambda one: one["doc_id"])])
        for samples in (before, after)
    )
    if all(np.isin(column, (0, 1)).all() for column in (first, second)):
        return share_score(name, first, second)
    return statistic_score(name, np.mean, [first], [second], statistics.RESAMPLES)
