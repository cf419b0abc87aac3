"""New examples from a teacher behind an OpenAI-compatible URL: written, checked, and kept only if they are new.

    synthesis = synthesize(config, Path("new.jsonl"), on_progress)

`write: examples` shows the teacher some seeds and takes the examples in its reply; `write: answers` asks the questions
of the seeds and takes the first reply to each that satisfies the constraints. Replies are taken in the order of their
requests, and saved as they come: an interrupted command ends with the same file as one that was not.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgebook import ray_cluster
from forgebook.config.curation_blocks import EndpointConfig, SynthesisConfig
from forgebook.config.data_block import HeldOut
from forgebook.config.schema import FinetuneConfig
from forgebook.curation.constraints import Constraints, make_constraints
from forgebook.curation.curate import check_output, report_paths
from forgebook.curation.duplicates import SeenExamples
from forgebook.curation.endpoint import Endpoint, Reply, Request
from forgebook.curation.ray_requests import ask_on_ray, workers_for
from forgebook.data import data_sources
from forgebook.data.examples import read_examples
from forgebook.data.row_formats import Example, parse_row
from forgebook.data.split import as_row
from forgebook.errors import ConfigError, DataError
from forgebook.runs.atomic import atomic_file, write_json

__all__ = ["Synthesis", "rejected_path", "synthesize"]

OnProgress = Callable[[str, int, int], None]
TEMPERATURE = 0.7
REQUESTS_PER_EXAMPLE = 20  # at most, unless max_requests says otherwise
PROMPT = """\
These are examples of the training data of a language model, one JSON object per line:
{seeds}

Write one new example of the same kind and in the same form, about something else. Its answer must be right. Reply \
with one JSON object on one line and nothing else."""


@dataclass
class Synthesis:
    """What synthesize wrote. rejected: (reason, what was rejected); replies: all that were looked at."""

    out: Path
    wanted: int
    accepted: int = 0
    replies: int = 0
    candidates: int = 0
    skipped_seeds: int = 0
    rejected: list[tuple[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Describe the result: how many were accepted, why others were not, tokens and cost."""
        reasons = collections.Counter(reason.partition(":")[0] for reason, _ in self.rejected)
        described: dict[str, Any] = {
            "out": str(self.out), "wanted": self.wanted, "accepted": self.accepted, "replies": self.replies,
            "yield": self.accepted / self.replies if self.replies else 0.0, "candidates": self.candidates,
            "rejected": dict(reasons.most_common()), "seeds_in_validation": self.skipped_seeds, **self.usage,
        }  # fmt: skip
        if self.accepted and "cost_usd" in self.usage:
            described["cost_usd_per_example"] = self.usage["cost_usd"] / self.accepted
        return described


def rejected_path(out: Path) -> Path:
    """Return where the rejected candidates are, with the reasons."""
    return out.with_suffix(".rejected.jsonl")


def synthesize(
    config: FinetuneConfig, out: Path, on_progress: OnProgress = lambda name, done, total: None
) -> Synthesis:
    """Write the accepted examples to `out` as JSON lines, and the report beside it; return what was done.

    Raises ConfigError for settings that cannot be used, before anything is asked; DataError if nothing was accepted;
    ResourceError if the teacher does not answer.
    """
    settings = config.synthesis
    if settings is None:
        raise ConfigError("synthesize needs a block `synthesis` with a teacher: see DATA.md")
    if config.task in ("preference_tuning", "classification") and settings.write == "examples":
        raise ConfigError(f"synthesize writes conversations: task {config.task} needs synthesis.write: answers")
    paths = settings.seeds or config.train_path
    valid_path = None if isinstance(config.valid_path, HeldOut) else config.valid_path
    sources = [source for path in (paths, valid_path) if path for source in data_sources.find_sources(path)]
    check_output(out, sources, rejected_path(out))
    ray_cluster.name_address(config.address)
    constraints = make_constraints(settings)
    seeds = read_examples(paths)
    validation = SeenExamples()
    for example in read_examples(valid_path) if valid_path else ():
        validation.add(example)
    endpoint = Endpoint(settings.teacher)
    synthesis = Synthesis(out, settings.count)
    write = _write_examples if settings.write == "examples" else _write_answers
    accepted = write(settings, seeds, validation, constraints, endpoint, synthesis)
    with atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for example in accepted:
            file.write(json.dumps(as_row(example), ensure_ascii=False) + "\n")
            synthesis.accepted += 1
            on_progress("examples accepted", synthesis.accepted, settings.count)
            if synthesis.accepted == settings.count:
                break
        accepted.close()  # what is being asked is still saved
        synthesis.usage = endpoint.usage.as_json(settings.teacher)
        if not synthesis.accepted:
            raise DataError(_nothing(synthesis))
        _write_rejected(synthesis)
    write_json(report_paths(out)[0], synthesis.as_json())
    return synthesis


# -- new examples


def _write_examples(
    settings: SynthesisConfig,
    seeds: list[Example],
    seen: SeenExamples,
    constraints: Constraints,
    endpoint: Endpoint,
    synthesis: Synthesis,
) -> Generator[Example, None, None]:
    """Yield accepted new examples. seen: the validation examples; seeds and accepted ones are added."""
    for seed in seeds:
        seen.add(seed)
    system = _shared_system(seeds)
    requests = _seed_requests(settings, seeds)
    for number, reply in _in_order(_ask(endpoint, requests, settings.workers, settings.count)):
        synthesis.replies += 1
        if reply.was_cut:
            synthesis.rejected.append(("cut: at max_tokens", reply.text))
            continue
        rows = list(_objects_in(reply.text))
        if not rows:
            synthesis.rejected.append(("unreadable: no JSON object in the reply", reply.text))
        for row in rows:
            synthesis.candidates += 1
            example = _parsed(row, f"reply:{number + 1}", system)
            problem = example if isinstance(example, str) else constraints.problem(example.conversation)
            if problem is None and not isinstance(example, str) and (like := seen.find(example)):
                problem = f"duplicate: of {like}"
            if problem is not None or isinstance(example, str):
                synthesis.rejected.append((str(problem), row))
                continue
            seen.add(example)
            yield example


def _seed_requests(settings: SynthesisConfig, seeds: list[Example]) -> Iterator[Request]:
    """Yield a request for each number: the same seeds each time the command runs."""
    for number in range(settings.max_requests or REQUESTS_PER_EXAMPLE * settings.count):
        chosen = random.Random(f"{settings.seed}-{number}").sample(seeds, min(settings.seeds_per_request, len(seeds)))
        lines = "\n".join(json.dumps(as_row(seed), ensure_ascii=False) for seed in chosen)
        text = (settings.prompt or PROMPT).replace("{seeds}", lines)
        yield _request(settings.teacher, ({"role": "user", "content": text},), number)


def _request(teacher: EndpointConfig, messages: tuple[dict[str, str], ...], seed: int) -> Request:
    temperature = TEMPERATURE if teacher.temperature is None else teacher.temperature
    return Request(messages, temperature, teacher.max_tokens, seed)


def _ask(
    endpoint: Endpoint, requests: Iterable[Request], workers: int | None, count: int
) -> Iterator[tuple[int, Reply]]:
    """Ask from this process, or for many by the workers of a Ray cluster. count: replies that are needed at least."""
    chosen = workers_for(endpoint, workers, count)
    return ask_on_ray(endpoint, requests, chosen) if chosen else endpoint.ask_all(requests)


def _in_order(replies: Iterable[tuple[int, Reply]]) -> Iterator[tuple[int, Reply]]:
    """Yield replies in the order of their requests, whichever comes first."""
    waiting: dict[int, Reply] = {}
    following = 0
    for number, reply in replies:
        waiting[number] = reply
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a reply, whatever stands around them."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(value, dict):
            yield value


def _parsed(row: dict[str, Any], where: str, system: str | None) -> Example | str:
    """Read an example in any format; or say why it is none. system: of all seeds, for one that lacks it."""
    if set(row) >= {"question", "answer"}:
        row = {"prompt": row["question"], "completion": row["answer"]}
    try:
        return parse_row(row, where, "instruction_tuning", system=system)[0]
    except DataError as error:
        return f"malformed: {error}"


def _shared_system(seeds: list[Example]) -> str | None:
    """Return the system message that all seeds have."""
    firsts = {
        str(seed.conversation[0]["content"]) if seed.conversation[0]["role"] == "system" else None for seed in seeds
    }
    return firsts.pop() if len(firsts) == 1 else None


# -- new answers


def _write_answers(
    settings: SynthesisConfig,
    seeds: list[Example],
    validation: SeenExamples,
    constraints: Constraints,
    endpoint: Endpoint,
    synthesis: Synthesis,
) -> Generator[Example, None, None]:
    """Yield seeds with an accepted answer: a round of requests for each sample, for the seeds still without one."""
    questions: dict[str, Example] = {}
    for seed in seeds:
        questions.setdefault(json.dumps(_question_of(seed)[0], sort_keys=True), seed)
    pending = [seed for seed in questions.values() if not validation.find(seed)]
    synthesis.skipped_seeds = len(questions) - len(pending)
    asked, most = 0, settings.max_requests or REQUESTS_PER_EXAMPLE * settings.count
    for sample in range(settings.samples):
        part = pending[: most - asked]
        asked += len(part)
        requests = (_request(settings.teacher, _asked(seed, settings.prompt), sample) for seed in part)
        unanswered = []
        for number, reply in _in_order(_ask(endpoint, requests, settings.workers, len(part))):
            seed = part[number]
            synthesis.replies += 1
            synthesis.candidates += 1
            before, reference = _question_of(seed)
            messages = [*before, {"role": "assistant", "content": reply.text}]
            example = _parsed({"messages": messages, "tools": seed.tools}, seed.where, None)
            problem = "cut: at max_tokens" if reply.was_cut else None
            if problem is None:
                problem = example if isinstance(example, str) else constraints.problem(messages, reference)
            if problem is not None or isinstance(example, str):
                synthesis.rejected.append((str(problem), {"messages": messages}))
                unanswered.append(seed)
                continue
            yield example
        pending = unanswered


def _question_of(seed: Example) -> tuple[list[Any], str | None]:
    """Divide a seed into its question and the right answer, if it has one."""
    messages = seed.conversation
    if messages[-1]["role"] == "assistant":
        return list(messages[:-1]), str(messages[-1].get("content") or "")
    return list(messages), None


def _asked(seed: Example, prompt: str | None) -> tuple[dict[str, str], ...]:
    """Return the messages of a request; the prompt stands around the last question."""
    *before, last = [{"role": m["role"], "content": str(m.get("content") or "")} for m in _question_of(seed)[0]]
    if prompt is not None:
        last = {**last, "content": prompt.replace("{question}", last["content"])}
    return (*before, last)


# -- what was rejected


def _nothing(synthesis: Synthesis) -> str:
    reasons = collections.Counter(reason for reason, _ in synthesis.rejected).most_common(5)
    shown = "\n  ".join(f"{count} x {reason[:300]}" for reason, count in reasons)
    return f"none of {synthesis.replies} replies was accepted, so nothing was written:\n  {shown}"


def _write_rejected(synthesis: Synthesis) -> None:
    with atomic_file(rejected_path(synthesis.out)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for reason, what in synthesis.rejected:
            file.write(json.dumps({"reason": reason, "rejected": what}, ensure_ascii=False) + "\n")
