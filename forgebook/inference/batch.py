"""Many prompts -> answers: in this process, with vLLM, or on Ray workers; an interrupted file is resumed.

    prompts = read_prompts("prompts.jsonl")
    for number, text in answer(find_model("quickstart"), prompts, Sampling(), engine="auto"): ...
    write_answers(Path("answers.jsonl"), source, prompts, Sampling())

A line of the written file is an example whose messages end with the answer, its tool calls read, so it can be trained
on as it is; "row" is the prompt's number, "reference" the answer in the prompts' file, "by" the model, its identity and
the sampling.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgebook.data.examples import read_examples
from forgebook.data.image_parts import PROMPTS, as_parts, image_count
from forgebook.data.image_tokens import check_images
from forgebook.data.tools import split_calls
from forgebook.errors import DataError, ResourceError, StorageError
from forgebook.inference import generate, loading
from forgebook.inference.generate import OnAnswers
from forgebook.inference.prompt_images import read_conversation
from forgebook.inference.sampling import Sampling
from forgebook.inference.vllm_model import load_in_vllm
from forgebook.models import adapters
from forgebook.models.identity import model_identity
from forgebook.models.vllm_support import choose_engine, vllm_ignores, vllm_serves_saved
from forgebook.runs import atomic

__all__ = ["Prompt", "answer", "engine_for", "read_prompts", "write_answers"]

# vLLM takes about a minute to start: engine=auto chooses it only for more prompts than this.
MIN_PROMPTS_FOR_VLLM = 100
# Batches per task of a Ray worker: enough to group by length, few enough to lose little when a worker dies.
BATCHES_PER_TASK = 8
# The size of such a batch where the memory of the workers decides.
TASK_BATCH = 32
# Characters of a model's identity in a line: enough to notice that a run was trained again under its name.
ID_LENGTH = 12

# Answers prompts with a loaded model: (number of the prompt, answer), in the order in which they are ready.
AnswerPrompts = Callable[[list["Prompt"], OnAnswers], Iterator[tuple[int, str]]]
# Called with the prompts that are answered, all prompts, the tokens generated so far, and the answers in progress as in
# `OnAnswers`.
OnProgress = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    number: its place in the file, from 0; reference: the file's own answer; where: file:line of it.
    """

    number: int
    messages: list[dict[str, Any]]
    tools: list[dict] | None = None
    reference: str | None = None
    where: str = field(default="", compare=False)


def read_prompts(path: str, count: int | None = None) -> list[Prompt]:
    """Read the first `count` conversations of a file; an assistant's last turn is the reference, not in the prompt.

    Raises DataError for an example that is a text.
    """
    prompts = []
    for number, example in enumerate(read_examples(path, PROMPTS, count)):
        messages = example.conversation
        has_answer = messages[-1]["role"] == "assistant"
        reference = messages[-1]["content"] if has_answer else None
        messages = messages[:-1] if has_answer else messages
        prompts.append(Prompt(number, messages, example.tools, reference, example.where))
    return prompts


def engine_for(requested: str, source: str, count: int, has_images: bool = False) -> str:
    """Choose what answers `count` prompts: vLLM where it is installed, can load the model and is worth its start.

    Raises ConfigError for an unknown engine, and for engine=vllm where vLLM is missing or cannot.
    """
    is_worth_it = count > MIN_PROMPTS_FOR_VLLM and _has_gpu()
    obstacle = "prompts with images are answered by transformers here" if has_images else None
    return choose_engine(requested, lambda: obstacle or _obstacle_for_vllm(source), is_worth_it)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _obstacle_for_vllm(source: str) -> str | None:
    if ignored := vllm_ignores(source):
        return ignored
    lora_config = adapters.read_lora_config(source)
    if lora_config is None:
        return None
    overrides = adapters.read_overrides(source)
    if overrides:
        return f"its base was loaded with {', '.join(overrides)} in training"
    verdict = vllm_serves_saved(source)
    return None if verdict == "yes" else verdict.removeprefix("no: ")


# Answering --------------------------------------------------------------------------------------------


def answer(
    source: str,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    engine: str = "auto",
    num_devices: int = 0,
    on_progress: OnAnswers = lambda done, tokens, begun: None,
) -> Iterator[tuple[int, str]]:
    """Yield (number of the prompt, answer) in the order in which they are ready.

    num_devices: 0 answers in this process; else this many Ray workers, each with a GPU if the cluster has any.
    on_progress: called at each step in this process; vLLM and Ray workers report complete answers alone, the latter
    without tokens.
    """
    engine = engine_for(engine, source, len(prompts), any(image_count(prompt.messages) for prompt in prompts))
    if num_devices:
        answers = _answer_on_ray(source, prompts, sampling, engine, num_devices)
    else:
        answers = _load(source, sampling, engine)(prompts, on_progress)
    for done, one in enumerate(answers, 1):
        if num_devices:
            on_progress(done, 0, 0.0)
        yield one


def _load(source: str, sampling: Sampling, engine: str) -> AnswerPrompts:
    """Load a model; return the function that answers prompts with it."""
    if engine == "vllm":
        return _load_in_vllm(source, sampling)
    [loaded] = loading.load_together([source])

    def answer_prompts(prompts: list[Prompt], on_progress: OnAnswers) -> Iterator[tuple[int, str]]:
        with loaded.active() as model, tempfile.TemporaryDirectory() as store:
            for k, text in generate.answer_in_batches(
                model,
                loaded.tokenizer,
                [_open_images(prompt, Path(store)) for prompt in prompts],
                sampling,
                prompt_format=loaded.prompt_format,
                tools=[prompt.tools for prompt in prompts],
                keep_special=None,
                numbers=[prompt.number for prompt in prompts],
                on_progress=on_progress,
                images=loaded.images,
                image_store=Path(store),
            ):
                yield prompts[k].number, text

    return answer_prompts


def _open_images(prompt: Prompt, store: Path) -> list[dict[str, Any]]:
    """Return a prompt's messages with their images checked. Raises DataError with file:line."""
    try:
        return check_images(prompt.messages, store)
    except DataError as error:
        raise DataError(f"{prompt.where}: {error}" if prompt.where else str(error)) from None


def _load_in_vllm(source: str, sampling: Sampling) -> AnswerPrompts:
    """Load a model into vLLM, an adapter on top of its base."""
    [loaded] = load_in_vllm([source])

    def answer_prompts(prompts: list[Prompt], on_progress: OnAnswers) -> Iterator[tuple[int, str]]:
        answers = loaded.answer_in_order(
            [prompt.messages for prompt in prompts],
            [prompt.tools for prompt in prompts],
            [prompt.number for prompt in prompts],
            sampling,
            keep_special=None,
            on_finished=lambda done, tokens: on_progress(done, tokens, 0.0),
        )
        for k, text, _ in answers:
            yield prompts[k].number, text

    return answer_prompts


class _Worker:
    """A Ray worker, which keeps the model loaded and answers parts of a set."""

    def __init__(self, source: str, sampling: Sampling, engine: str):
        self.answer_prompts = _load(source, sampling, engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [Prompt(**json.loads(prompt)) for prompt in batch["prompt"]]
        prompts = [dataclasses.replace(one, messages=read_conversation(one.messages)) for one in prompts]
        answers = list(self.answer_prompts(prompts, lambda done, tokens, begun: None))
        return {"number": [number for number, _ in answers], "text": [text for _, text in answers]}


def _answer_on_ray(
    source: str, prompts: list[Prompt], sampling: Sampling, engine: str, workers: int
) -> Iterator[tuple[int, str]]:
    """Answer with an actor pool of Ray Data, streaming: answers arrive while others are generated."""
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
    # Tasks are grouped by length, the longest first, so that the last ones are short.
    ordered = sorted(prompts, key=lambda prompt: -sum(len(message["content"]) for message in prompt.messages))
    size = min(BATCHES_PER_TASK * (sampling.batch_size or TASK_BATCH), -(-len(ordered) // workers))
    items = [{"prompt": json.dumps(vars(prompt) | {"messages": as_parts(prompt.messages)})} for prompt in ordered]
    answers = ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
        _Worker,
        batch_size=size,
        fn_constructor_args=(source, sampling, engine),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **each,
    )
    for answer_row in answers.iter_rows():
        yield int(answer_row["number"]), answer_row["text"]


# The file ---------------------------------------------------------------------------------------------


def write_answers(
    path: Path,
    source: str,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    engine: str = "auto",
    num_devices: int = 0,
    on_progress: OnProgress = lambda done, total, tokens, begun: None,
) -> int:
    """Answer prompts into a file, line by line; prompts that the file answers already are skipped.

    At the end its lines are in the order of the prompts. Returns how many were answered now.

    Raises StorageError if the file has answers to other prompts, or of another model or sampling.
    """
    # batch_size changes no answer.
    settings = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
    settings = {"id": model_identity(source)[:ID_LENGTH], **settings}
    by = " ".join([source, *(f"{key}={value}" for key, value in settings.items())])
    by_number = {prompt.number: prompt for prompt in prompts}
    lines = _read_answers(path, by_number, by)
    missing = [prompt for prompt in prompts if prompt.number not in lines]
    answered, total = len(lines), len(prompts)
    on_progress(answered, total, 0, 0.0)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        # First the complete lines of an earlier file, then the new answers.
        _rewrite(path, lines)
        with open(path, "a") as file:
            for number, text in answer(
                source, missing, sampling, engine=engine, num_devices=num_devices,
                on_progress=lambda done, tokens, begun: on_progress(answered + done, total, tokens, begun),
            ):  # fmt: skip
                lines[number] = _line(by_number[number], _message(text, by_number[number].tools), by)
                file.write(lines[number] + "\n")
                file.flush()
    _rewrite(path, dict(sorted(lines.items())))
    return len(missing)


def _message(text: str, tools: list[dict] | None) -> dict[str, Any]:
    """Write an answer as an assistant's turn, its calls as OpenAI has them."""
    content, calls = split_calls(text, tools)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return message | ({"tool_calls": [{"type": "function", "function": one} for one in functions]} if calls else {})


def _line(prompt: Prompt, answer: dict[str, Any], by: str) -> str:
    line: dict[str, Any] = {"row": prompt.number}
    line["messages"] = [*as_parts(prompt.messages), answer]
    optional = {"tools": prompt.tools, "reference": prompt.reference}
    line |= {key: value for key, value in optional.items() if value is not None}
    return json.dumps(line | {"by": by}, ensure_ascii=False)


def _read_answers(path: Path, prompts: dict[int, Prompt], by: str) -> dict[int, str]:
    """Read the lines of an earlier file by prompt number; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return {}
    lines = {}
    # Not splitlines: an answer may hold a line separator of Unicode. What follows the last line end was cut off.
    for line_number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            number, messages, written_by = row["row"], row["messages"], row["by"]
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"{path}:{line_number}: not a line of answers: choose another out=FILE") from None
        prompt = prompts.get(number)
        if prompt is None or (as_parts(prompt.messages), prompt.tools) != (messages[:-1], row.get("tools")):
            raise StorageError(
                f"{path}:{line_number} answers another prompt than prompt {number}: choose another out=FILE"
            )
        if written_by != by:
            raise StorageError(f"{path}:{line_number} was written by {written_by}, not {by}: choose another out=FILE")
        lines[number] = _line(prompt, messages[-1], by)  # the prompts' file may have another reference now
    return lines


def _rewrite(path: Path, lines: dict[int, str]) -> None:
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines.values()))
