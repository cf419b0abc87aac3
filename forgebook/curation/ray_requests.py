"""Requests from the workers of a Ray cluster, by Ray Data: for more than one machine has connections or patience for.

for number, reply in ask_on_ray(endpoint, requests, workers=4): ...      as Endpoint.ask_all does in this process

Replies stream back and are saved here, where those of an earlier command are, so that an interrupted one asks nothing
twice. A worker reads the API key from its environment: ray_cluster passes it on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from forgebook.config.curation_blocks import EndpointConfig
from forgebook.curation.endpoint import Endpoint, Reply, Request
from forgebook.errors import ConfigError, ResourceError

__all__ = ["LARGE", "ask_on_ray", "workers_for"]

LARGE = 10_000  # requests, from which on Ray Data sends them unless the config says otherwise
MOST_WORKERS = 8  # by default: an endpoint is rarely ready for more than these times `concurrency`
TASK_ROUNDS, WAVE_TASKS = 2, 4  # requests of a task, per connection; tasks of a wave, per worker


def workers_for(endpoint: Endpoint, workers: int | None, count: int) -> int:
    """Return how many workers send `count` requests; 0 for this process. workers: of the config."""
    if workers is not None or count < LARGE:
        return workers or 0
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray(secrets=[endpoint.settings.api_key_env])
    return max(1, min(MOST_WORKERS, int(ray.cluster_resources().get("CPU", 1))))


def ask_on_ray(endpoint: Endpoint, requests: Iterable[Request], workers: int) -> Iterator[tuple[int, Reply]]:
    """Yield (number of the request, its reply) as replies come; saved ones are not asked again.

    Requests are taken in waves, so that one who stops early has not asked all of them. Raises as Endpoint.ask_all does.
    """
    per_task = TASK_ROUNDS * endpoint.settings.concurrency
    numbered = enumerate(requests)
    while wave := list(itertools.islice(numbered, workers * WAVE_TASKS * per_task)):
        pending = []
        for number, request in wave:
            if (reply := endpoint.saved(request)) is None:
                pending.append((number, request))
            else:
                yield number, reply
        if pending:
            yield from _ask_wave(endpoint, pending, workers, per_task)


def _ask_wave(
    endpoint: Endpoint, pending: list[tuple[int, Request]], workers: int, per_task: int
) -> Iterator[tuple[int, Reply]]:
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray(secrets=[endpoint.settings.api_key_env])
    ray.data.DataContext.get_current().enable_progress_bars = False
    by_number = dict(pending)
    items = [{"number": number, "request": json.dumps(asdict(request))} for number, request in pending]
    settings = endpoint.settings.model_copy(update={"base_url": endpoint.url})  # OPENAI_BASE_URL may be here alone
    rows = ray.data.from_items(items, override_num_blocks=-(-len(items) // per_task)).map_batches(
        _Asker,
        batch_size=per_task,
        fn_constructor_args=(settings.model_dump_json(include=set(EndpointConfig.model_fields)),),
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    problem: Exception | None = None
    for row in rows.iter_rows():
        endpoint.usage.repeated += int(row["repeated"])
        if row["error"]:
            kind = {"ConfigError": ConfigError, "ResourceError": ResourceError}[row["error"]]
            problem = problem or kind(row["reply"])  # what others have answered is saved first
            continue
        number = int(row["number"])
        reply = Reply(**json.loads(row["reply"]))
        endpoint.save(by_number[number], reply)
        yield number, reply
    if problem is not None:
        raise problem


class _Asker:
    """One worker: sends the requests of a batch, `concurrency` at a time."""

    def __init__(self, settings: str):
        self._endpoint = Endpoint(EndpointConfig.model_validate_json(settings), saves=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["number"]]
        rows: dict[str, list[Any]] = {"number": [], "reply": [], "error": [], "repeated": []}
        before = self._endpoint.usage.repeated
        replies = self._endpoint.ask_all(
            Request(**{**one, "messages": tuple(one["messages"])}) for one in map(json.loads, batch["request"])
        )
        try:
            for at, reply in replies:
                _add(rows, numbers[at], json.dumps(asdict(reply)))
        except (ConfigError, ResourceError) as error:
            _add(rows, -1, str(error), type(error).__name__)
        if rows["repeated"]:
            rows["repeated"][-1] = self._endpoint.usage.repeated - before
        return rows


def _add(rows: dict[str, list[Any]], number: int, reply: str, error: str = "") -> None:
    for name, value in {"number": number, "reply": reply, "error": error, "repeated": 0}.items():
        rows[name].append(value)
