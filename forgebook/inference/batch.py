"""Many prompts -> answers: in this process, with vLLM, or on Ray workers; a file is continued where it stopped.

    asked = read_prompts("prompts.jsonl")
    for number, text in answer(find_model("quickstart"), asked, Sampling(), engine="auto"): ...
    write_answers(Path("answers.jsonl"), source, asked, Sampling())

A line of the written file is a row of messages that ends with the answer, so it can be trained on as it is; "row" is
the prompt's number, "reference" the answer that its file gave, "by" the model and the sampling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forgebook.data import tokenize
from forgebook.errors import DataError, ResourceError, StorageError
from forgebook.inference import generate
from forgebook.inference.sampling import Sampling, prompt_seed
from forgebook.models import adapters
from forgebook.models.vllm_support import choose_engine, vllm_max_rank, vllm_serves
from forgebook.runs import atomic

__all__ = ["Prompt", "answer", "engine_for", "read_prompts", "write_answers"]

# vLLM takes about a minute to start: engine=auto chooses it only for more prompts than this.
MIN_PROMPTS_FOR_VLLM = 100
# vLLM batches by itself; so many prompts are handed to it at once, then written.
VLLM_CHUNK = 1_000
# Batches per task of a Ray worker: enough to sort by length, few enough to lose little with a worker.
BATCHES_PER_TASK = 8


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered. number: its row in the file, from 0; reference: what the file answers."""

    number: int
    messages: list[dict[str, Any]]
    tools: list[dict] | None = None
    reference: str | None = None


def read_prompts(path: str, rows: int | None = None) -> list[Prompt]:
    """Read rows of messages; an assistant's last turn is the reference, not part of the prompt."""
    asked = []
    for number, row in enumerate(tokenize.read_rows(path, "causal_lm", rows)):
        if row.messages is None:
            raise DataError(f"{row.where}: a text, need messages that end with a question")
        has_answer = row.messages[-1]["role"] == "assistant"
        reference = row.messages[-1]["content"] if has_answer else None
        asked.append(Prompt(number, row.messages[:-1] if has_answer else row.messages, row.tools, reference))
    return asked


def engine_for(requested: str, source: str, count: int) -> str:
    """Choose what answers `count` prompts: vLLM where it is installed, can load the model and is worth its start.

    Raises ConfigError for an unknown engine, and for engine=vllm where vLLM is missing or cannot.
    """
    is_worth_it = count > MIN_PROMPTS_FOR_VLLM and _has_gpu()
    return choose_engine(requested, lambda: _obstacle_for_vllm(source), is_worth_it)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _obstacle_for_vllm(source: str) -> str | None:
    lora_config = adapters.read_lora_config(source)
    if lora_config is None:
        return None
    overrides = adapters.read_overrides(source)
    if overrides:
        return f"its base was loaded with {', '.join(overrides)} in training"
    verdict = vllm_serves(lora_config)
    return None if verdict == "yes" else verdict.removeprefix("no: ")


# Answering --------------------------------------------------------------------------------------------


def answer(
    source: str, asked: list[Prompt], sampling: Sampling, *, engine: str = "auto", num_devices: int = 0
) -> Iterator[tuple[int, str]]:
    """Yield (number of the prompt, answer), in the order in which they are ready.

    num_devices: 0 answers in this process; else as many Ray workers, each with a GPU if the cluster has any.
    """
    engine = engine_for(engine, source, len(asked))
    if num_devices:
        yield from _with_ray(source, asked, sampling, engine, num_devices)
    else:
        yield from _answerer(source, sampling, engine)(asked)


def _answerer(source: str, sampling: Sampling, engine: str) -> Callable[[list[Prompt]], Iterator[tuple[int, str]]]:
    """Load a model; return what answers prompts with it."""
    if engine == "vllm":
        return _with_vllm(source, sampling)
    [loaded] = generate.load_together([source])

    def answered(asked: list[Prompt]) -> Iterator[tuple[int, str]]:
        with loaded.active() as model:
            for k, text in generate.answer_in_batches(
                model, loaded.tokenizer, [one.messages for one in asked], sampling,
                prompt_format=loaded.prompt_format, tools=[one.tools for one in asked],
                numbers=[one.number for one in asked],
            ):  # fmt: skip
                yield asked[k].number, text

    return answered


def _with_vllm(source: str, sampling: Sampling):
    """Load a model into vLLM, an adapter on top of its base; prompts reach it as the token ids of training."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from forgebook.data import masking

    base, _ = generate.base_of(source)
    ends, tokenizer, prompt_format = generate.load_ends(source)
    adapter, options = None, {}
    if lora_config := adapters.read_lora_config(source):
        adapter = LoRARequest("adapter", 1, source)
        options = {"enable_lora": True, "max_lora_rank": vllm_max_rank([lora_config])}
    engine = LLM(model=base, tokenizer=source, **options)

    def answered(asked: list[Prompt]) -> Iterator[tuple[int, str]]:
        for start in range(0, len(asked), VLLM_CHUNK):
            part = asked[start : start + VLLM_CHUNK]
            inputs = [
                {"prompt_token_ids": masking.encode_prompt(one.messages, tokenizer, prompt_format, one.tools)}
                for one in part
            ]
            wanted = [
                SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                    seed=prompt_seed(sampling.seed, one.number), stop=ends.stop_strings,
                    stop_token_ids=ends.eos_token_id,
                )
                for one in part
            ]  # fmt: skip
            for one, output in zip(part, engine.generate(inputs, wanted, lora_request=adapter), strict=True):
                yield one.number, output.outputs[0].text

    return answered


class _Worker:
    """Answer parts of a set in a Ray worker, which keeps the model loaded."""

    def __init__(self, source: str, sampling: Sampling, engine: str):
        self.answered = _answerer(source, sampling, engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        asked = [Prompt(**json.loads(written)) for written in batch["prompt"]]
        made = list(self.answered(asked))
        return {"number": [number for number, _ in made], "text": [text for _, text in made]}


def _with_ray(
    source: str, asked: list[Prompt], sampling: Sampling, engine: str, workers: int
) -> Iterator[tuple[int, str]]:
    """Answer with an actor pool of Ray Data, streaming: answers arrive while others are written."""
    import ray

    from forgebook import ray_cluster

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ray_cluster.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = ray.cluster_resources()
    kind = "GPU" if total.get("GPU") else "CPU"
    if workers > total.get(kind, 0):
        raise ResourceError(f"num_devices is {workers}, the cluster has {total.get(kind, 0):g} {kind}s: lower it")
    each = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": max(1, int(total["CPU"]) // workers)}
    # Prompts of like length go together, the longest first: the last tasks are short ones.
    ordered = sorted(asked, key=lambda one: -sum(len(message["content"]) for message in one.messages))
    size = min(BATCHES_PER_TASK * sampling.batch_size, -(-len(ordered) // workers))
    items = [{"prompt": json.dumps(asdict(one))} for one in ordered]
    made = ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
        _Worker, batch_size=size, fn_constructor_args=(source, sampling, engine), **each,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )  # fmt: skip
    for row in made.iter_rows():
        yield int(row["number"]), row["text"]


# The file ---------------------------------------------------------------------------------------------


def write_answers(
    path: Path,
    source: str,
    asked: list[Prompt],
    sampling: Sampling,
    *,
    engine: str = "auto",
    num_devices: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Answer prompts into a file, written as it goes; rows that it holds already are not answered again.

    In the end its lines are in the order of the prompts. Returns how many were answered now.

    Raises StorageError if the file holds answers to other prompts, or of another model or sampling.
    """
    # How many at a time changes no answer.
    chosen = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
    by = " ".join([source, *(f"{key}={value}" for key, value in chosen.items())])
    done = _read_answers(path, asked, by)
    missing = [one for one in asked if one.number not in done]
    by_number = {one.number: one for one in asked}
    on_progress(len(done), len(asked))
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What is whole of an earlier file, then the new answers.
        _rewrite(path, done)
        with open(path, "a") as file:
            for number, text in answer(source, missing, sampling, engine=engine, num_devices=num_devices):
                done[number] = _line(by_number[number], text, by)
                file.write(done[number] + "\n")
                file.flush()
                on_progress(len(done), len(asked))
    _rewrite(path, dict(sorted(done.items())))
    return len(missing)


def _line(one: Prompt, text: str, by: str) -> str:
    row = {"row": one.number, "messages": [*one.messages, {"role": "assistant", "content": text}]}
    kept = {key: value for key, value in (("tools", one.tools), ("reference", one.reference)) if value is not None}
    return json.dumps(row | kept | {"by": by}, ensure_ascii=False)


def _read_answers(path: Path, asked: list[Prompt], by: str) -> dict[int, str]:
    """Read the lines of an earlier file by row; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return {}
    found, prompts = {}, {one.number: one.messages for one in asked}
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            messages, made_by = row["messages"], row["by"]
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"{path}:{number}: not a line of answers: choose another out=FILE") from None
        if prompts.get(row["row"]) != messages[:-1]:
            raise StorageError(f"{path}:{number} answers another prompt than row {row['row']}: choose another out=FILE")
        if made_by != by:
            raise StorageError(f"{path}:{number} was written by {made_by}, not {by}: choose another out=FILE")
        found[row["row"]] = line.rstrip("\n")
    return found


def _rewrite(path: Path, lines: dict[int, str]) -> None:
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines.values()))
