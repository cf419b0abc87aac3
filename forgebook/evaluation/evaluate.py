"""Is the tuned model better than its base? Both answer held-out examples; the figures say how certain that is.

    evaluation = evaluate(run, path="test.jsonl", metric="gsm8k")
    results.save(evaluation, run)

metric           examples                               right is
exact_match      end with an assistant's turn           the reference, outer white space aside
anls             the same; documents and their images   the reference; slips of reading cost a part (ANLS)
gsm8k            the same                               the number after ####
tool_calls       with tools; every assistant turn       the reference's calls in every turn of a conversation
judge            end with an assistant's turn           what a language model prefers (forgebook/evaluation/judge.py)
classification   end with a label                       the most likely label; also the metrics of the run's config
preference       pairs                                  the chosen answer more likely than the rejected
perplexity       any that the run could train on        (how likely the tokens in the loss are)
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.config.blocks import GenerationConfig, labels_of
from forgebook.config.data_block import DataSource, with_training_system
from forgebook.config.parse import load_config, load_resolved
from forgebook.data import tokenize
from forgebook.data.chat_template import render
from forgebook.data.examples import display_paths, read_examples, validation_source
from forgebook.data.generation_prompt import after_thought, opened_thought
from forgebook.data.image_parts import image_count
from forgebook.data.image_tokens import check_images
from forgebook.data.row_formats import Example
from forgebook.data.special_tokens import special_texts
from forgebook.errors import ConfigError, DataError
from forgebook.evaluation import statistics
from forgebook.evaluation.answers import SavedAnswers, prompt_key
from forgebook.evaluation.judge import Judge
from forgebook.evaluation.results import Comparison, Evaluation, conversation_text, limit_text, message_text
from forgebook.evaluation.scoring import Said, Turn, judged, said_by, scored
from forgebook.inference import loading
from forgebook.inference.batch import engine_for
from forgebook.inference.loading import LoadedModel
from forgebook.inference.vllm_model import VllmModel, load_in_vllm
from forgebook.models.adapters import trains_biases
from forgebook.models.identity import model_identity
from forgebook.models.tokenizer import locate
from forgebook.runs.run import Run, display_path, find_checkpoint

if TYPE_CHECKING:
    from forgebook.evaluation.logprobs import Models, OnProgress

__all__ = ["both_models", "evaluate"]

METRICS = ("exact_match", "anls", "gsm8k", "tool_calls", "judge", "classification", "preference", "perplexity")
LIKELIHOOD_METRICS = METRICS[-3:]
# How many tokens an answer may have: half as many again as the longest reference, but not this many more, and at least
# as many as LEAST_TOKENS. An answer that does not stop is cut there, and its time is most of an evaluation's.
MOST_MORE_TOKENS, LEAST_TOKENS = 512, 128
USUAL_METRICS = {"classification": "classification", "causal_lm": "perplexity", "preference_tuning": "preference"}


def evaluate(
    run: Run,
    *,
    path: str | None = None,
    metric: str | None = None,
    rows: int | None = None,
    checkpoint: str | None = None,
    judge: Judge | None = None,
    max_new_tokens: int | None = None,
    engine: str = "auto",
    on_progress: OnProgress = lambda *counts: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure a run's checkpoint, and the model from which the run started, on the same held-out examples.

    path: held-out examples, those without a system message with that of all training data, if `train_path` sets one;
    default: the run's validation file. metric: see the table above; default: by the task and
    the examples. rows: the first so many. checkpoint: default the best. max_new_tokens: of an answer; default: by the
    longest reference. engine: what generates answers, as in `batch.engine_for`. on_note: called with what the user
    should know before the answers, a sentence at a time.

    Answers are saved in the run folder as they come; a call after an interrupted one uses them.

    Raises ConfigError without held-out examples or for an unknown metric, StorageError if the run has not finished.
    torch is imported only after the examples are read, so that a mistake in them is reported at once.
    """
    config = load_resolved(run.config)
    source, classifier = validation_source(run, config.valid_path), config.classifier_config
    if path is not None:
        source = with_training_system({"train_path": config.train_path, "valid_path": path})["valid_path"]
        source = DataSource.model_validate(source) if isinstance(source, dict) else source
    if source is None:
        raise ConfigError(f"the run {run.name} has no valid_path: name held-out examples with data=FILE")
    metric = "tool_calls" if metric == "tool_accuracy" else metric
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"evaluate: unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    chosen = metric or USUAL_METRICS.get(config.task, "exact_match")
    if chosen == "classification" and classifier is None:
        raise ConfigError(f"metric=classification: the run {run.name} has no classifier_config with label_tokens")
    if chosen == "judge" and judge is None:
        raise ConfigError("metric=judge needs judge=MODEL, and base_url=URL unless it is OpenAI's")
    if engine == "vllm" and chosen in LIKELIHOOD_METRICS:
        raise ConfigError(f"engine=vllm generates answers, and metric={chosen} needs none: remove engine")
    models = both_models(run, checkpoint)
    task = _task_of(chosen, config.task)
    labels = labels_of(classifier) if task == "classification" else ()
    # The run's own examples were read by its rule; a file that is named here is to be whole.
    examples = read_examples(source, task, rows, labels, "fail" if path is not None else config.on_bad_rows)
    has_images = any(image_count(example.messages) for example in examples)
    if has_images and chosen in ("judge", *LIKELIHOOD_METRICS):
        where = display_paths(source)
        raise ConfigError(f"metric={chosen} reads text alone, and {where} has images: use exact_match or anls")
    if classifier and chosen == "classification":
        from forgebook.evaluation import likelihood_metrics

        return likelihood_metrics.classification(examples, labels, classifier.eval_metrics, models, on_progress)
    if chosen in ("preference", "perplexity"):
        from forgebook.evaluation import likelihood_metrics, logprobs

        options = tokenize.EncodingOptions(task, None, config.train_on, config.rewritten_turns)
        measured = logprobs.measure(examples, options, config.context_length, config.truncation, models, on_progress)
        if chosen == "preference":
            return likelihood_metrics.preference(measured)
        return likelihood_metrics.perplexity(measured)
    if metric is None and any(example.tools for example in examples):
        chosen = "tool_calls"
    turns = [turn for k, example in enumerate(examples) for turn in _turns(k, example, chosen == "tool_calls")]
    if not turns:
        raise DataError("no assistant turn of these examples follows a prompt, so there is nothing to answer")
    numbers = (statistics.gsm8k_number(said_by(turn.reference)) for turn in turns)
    if metric is None and chosen == "exact_match" and all(number is not None for number in numbers):
        on_note("every reference has a number after ####: metric=gsm8k compares it alone, exact_match the whole answer")
    folder = run.folder / "evaluation"
    if engine_for(engine, _tuned(run, checkpoint), 2 * len(turns), has_images) == "vllm":
        models = both_models(run, checkpoint, in_vllm=True)
    with tempfile.TemporaryDirectory() as store:
        turns = [_with_open_images(turn, Path(store)) for turn in turns]
        compared, said, limits = _answer(
            turns, chosen == "tool_calls", max_new_tokens, models, folder, Path(store), on_progress, on_note
        )
    if judge is not None and chosen == "judge":
        evaluation = judged(turns, compared, said, judge, on_progress)
    else:
        evaluation = scored(chosen, turns, compared, said)
    left_out = len(examples) - len({turn.example for turn in turns})
    return dataclasses.replace(evaluation, limits=limits, left_out=left_out)


def _task_of(metric: str, task: str) -> str:
    """Return the task by whose rules the examples of a metric are read and encoded; task: the run's."""
    if metric == "perplexity" and task == "causal_lm":
        return "causal_lm"
    tasks = {"classification": "classification", "preference": "preference_tuning"}
    return tasks.get(metric, "vision_language" if task == "vision_language" else "instruction_tuning")


def both_models(run: Run, checkpoint: str | None = None, in_vllm: bool = False) -> Models:
    """Yield ("base", the model from which a run started), then ("tuned", its checkpoint), loaded one by one.

    Raises StorageError if there is no such checkpoint, or the run has not finished and none is named.
    """
    config = load_config(run.config)
    start = config.initial_adapter_model_ckpt_path or config.initial_base_model_ckpt_path or config.model_id
    share_weights = config.classifier_config is None  # a classifier's labels are tokens that its base lacks
    sources = [locate(start), _tuned(run, checkpoint)]
    models: Iterator[Any] = (
        load_in_vllm(sources, config.dtype, config.generation_config)
        if in_vllm
        else _load_models(sources, share_weights, config.dtype, config.generation_config)
    )
    return zip(("base", "tuned"), models, strict=True)


def _tuned(run: Run, checkpoint: str | None) -> str:
    """Return the folder of a run's checkpoint; None and "best": the best one."""
    return str(find_checkpoint(str(run.folder), None if checkpoint == "best" else checkpoint))


def _load_models(
    sources: list[str], share_weights: bool, dtype: str, defaults: GenerationConfig
) -> Iterator[LoadedModel]:
    """Load each model: if they can share the weights of a base, those once; else one model after the other."""
    can_share = loading.base_of(sources[0]) == loading.base_of(sources[1]) and not any(map(trains_biases, sources))
    if share_weights and can_share:
        yield from loading.load_together(sources, dtype, defaults)
        return
    for source in sources:
        yield loading.load_together([source], dtype, defaults)[0]
        gc.collect()  # frees the first model before the second is loaded


# By answers -------------------------------------------------------------------------------------------


def _turns(number: int, example: Example, every: bool) -> list[Turn]:
    """List the turns of an example to answer: the last one, or every assistant turn that is in the loss."""
    messages = example.conversation
    if messages[-1]["role"] != "assistant" and not every:
        raise DataError(f"{example.where}: messages: must end with the assistant's turn that answers are compared with")
    places = [k for k, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    places = places if every else [len(messages) - 1]
    return [Turn(number, example.where, messages[:k], example.tools, messages[k]) for k in places if k]


def _with_open_images(turn: Turn, store: Path) -> Turn:
    """Check the images of a turn's prompt. Raises DataError with its file:line."""
    try:
        return dataclasses.replace(turn, messages=check_images(turn.messages, store))
    except DataError as error:
        raise DataError(f"{turn.where}: {error}") from None


def _answer(
    turns: list[Turn],
    keep_special: bool,
    limit: int | None,
    models: Models,
    folder: Path,
    store: Path,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> tuple[Comparison, list[Said], dict[str, int]]:
    """Let both models answer every turn, and save each answer in a folder. store: where images are kept.

    limit: tokens per answer; None: by the longest reference. Returns the answers, what those of the base and of the
    tuned model say after their thoughts, and the limit as evaluation.json has it.
    """
    references = [message_text(turn.reference) for turn in turns]
    written = [
        "\n".join(filter(None, (turn.reference.get("reasoning_content"), text)))
        for turn, text in zip(turns, references, strict=True)
    ]
    keys = [prompt_key(turn.messages, turn.tools) for turn in turns]
    answers: dict[str, list[str]] = {}
    said: list[Said] = []
    limits: dict[str, int] = {}
    for name, loaded in models:
        limits = limits or _answer_limits(loaded.tokenizer, written, limit)
        if not answers:
            on_note(limit_text(limits))
        settings = {
            "model": model_identity(loaded.source),
            "dtype": loaded.dtype,
            "encoding": tokenize.CACHE_VERSION,
            "prompt_format": repr(loaded.prompt_format),
            "chat_template": loaded.tokenizer.chat_template,
            "generation_config": loaded.generation_config.to_diff_dict(),
            "max_new_tokens": limits["max_new_tokens"],
            "keep_special": keep_special,
        }
        if isinstance(loaded, VllmModel):
            settings["engine"] = "vllm"
        saved = SavedAnswers(folder, name, settings)
        missing = [k for k, key in enumerate(keys) if key not in saved]
        if answered := len(turns) - len(missing):
            on_note(f"{answered} of {len(turns)} answers of the {name} model are in {display_path(saved.path)}")
        on_progress(name, answered, len(turns))
        of_images: Any = {} if isinstance(loaded, VllmModel) else {"image_store": store}
        loaded.answer(
            [turns[k].messages for k in missing],
            tools=[turns[k].tools for k in missing],
            keep_special=keep_special,
            max_new_tokens=limits["max_new_tokens"],
            on_progress=functools.partial(_report_answers, on_progress, name, answered, len(turns)),
            on_answer=functools.partial(_save, saved, [keys[k] for k in missing]),
            **of_images,
        )
        answers[name] = [saved[key] for key in keys]
        closings = [_closing(turn, loaded, keep_special) for turn in turns]
        said.append([after_thought(*pair) for pair in zip(answers[name], closings, strict=True)])
        del loaded
    prompts = [conversation_text(turn.messages) for turn in turns]
    return Comparison(prompts, references, answers["base"], answers["tuned"]), said, limits


def _closing(turn: Turn, loaded: LoadedModel | VllmModel, keep_special: bool) -> str:
    """Return what closes the thought in which a turn's prompt ends; empty if it ends in none."""
    tokenizer = loaded.tokenizer
    closing = opened_thought(
        render(turn.messages, tokenizer, loaded.prompt_format, for_generation=True, tools=turn.tools)
    )
    # A special token is not in the text of an answer, so that nothing tells where its thought ends.
    return "" if not keep_special and special_texts(closing, tokenizer) else closing


def _save(saved: SavedAnswers, keys: list[str], index: int, text: str) -> None:
    saved.add(keys[index], text)


def _report_answers(
    on_progress: OnProgress, name: str, answered: int, total: int, done: int, tokens: int, begun: float
) -> None:
    on_progress(name, answered + done, total, tokens, begun)


def _answer_limits(tokenizer, references: list[str], limit: int | None) -> dict[str, int]:
    """Return the tokens that an answer may have, and those of the longest reference; names as in evaluation.json."""
    longest = max(map(len, tokenizer(references, add_special_tokens=False)["input_ids"]))
    margin = min(max(longest // 2, 8), MOST_MORE_TOKENS)
    return {"max_new_tokens": limit or max(LEAST_TOKENS, longest + margin), "longest_reference_tokens": longest}
