"""Is the tuned model better than its base? Both answer held-out rows; the figures say how sure that is.

    evaluation = evaluate(run, path="test.jsonl", metric="gsm8k")
    findings.save(evaluation, run)

metric           rows                                   right is
exact_match      end with an assistant's turn           the reference, outer white space aside
gsm8k            the same                               the number after ####
tool_calls       with tools; every assistant turn       the reference's calls in every turn of a conversation
judge            end with an assistant's turn           what a language model prefers (forgebook/evaluation/judge.py)
classification   end with a label                       the likeliest label; also the metrics of the run's config
preference       pairs                                  the chosen answer found likelier than the rejected
perplexity       any that the run could train on        (how well the trained tokens are foreseen)
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.data import batching, tokenize
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens, fit_tokens
from forgebook.data.tools import calls_of_message
from forgebook.errors import ConfigError, DataError
from forgebook.evaluation import logprobs, statistics, tool_accuracy
from forgebook.evaluation.judge import AnswerPair, Judge, judge_all
from forgebook.evaluation.results import Comparison, Evaluation, Score, as_read, exact_match, make_evaluation, said
from forgebook.inference import generate
from forgebook.inference.generate import LoadedModel
from forgebook.models.tokenizer import locate
from forgebook.runs import run as storage
from forgebook.runs.run import Run
from forgebook.training import classification

__all__ = ["METRICS", "Comparison", "both_models", "compare_with_base", "evaluate", "exact_match"]

# Of each metric, how long an answer may be, in tokens; None: as the longest reference, and some more.
METRICS = {
    "exact_match": None, "gsm8k": 512, "tool_calls": 256, "judge": 512,
    "classification": 0, "preference": 0, "perplexity": 0,
}  # fmt: skip
# Resamples for metrics of scikit-learn, which take a thousand times as long as a mean.
CLASSIFIER_RESAMPLES = 999
Tell = Callable[[str, int, int], None]
Told = Iterator[tuple[str, LoadedModel]]


def compare_with_base(run: Run, path: str | None = None, rows: int | None = None) -> Comparison:
    """Let a run's best checkpoint and the model it began from answer the last turn of held-out rows; see `evaluate`."""
    return evaluate(run, path=path, metric="exact_match", rows=rows).comparison


def evaluate(
    run: Run,
    *,
    path: str | None = None,
    metric: str | None = None,
    rows: int | None = None,
    checkpoint: str | None = None,
    judge: Judge | None = None,
    max_new_tokens: int | None = None,
    on_progress: Tell = lambda name, done, total: None,
) -> Evaluation:
    """Measure a run's checkpoint, and the model that the run began from, on the same held-out rows.

    path: held-out rows; default: the run's validation file. metric: one of METRICS; default: by task and rows.
    rows: the first so many. checkpoint: default the best. on_progress: called with (model, rows done, all).

    Raises ConfigError without rows to ask or for an unknown metric, StorageError if the run is not complete.
    """
    config = load_config(run.config)
    _check(run, config, path, metric, judge)
    told = both_models(run, checkpoint)
    chosen = metric or _usual_metric(config.task)
    labels = tuple(config.classifier_config.label_tokens) if chosen == "classification" else ()
    held_out = tokenize.read_examples(path or config.valid_path, _read_as(chosen, config), rows, labels)
    if metric is None and chosen == "exact_match" and any(row.tools for row in held_out):
        chosen = "tool_calls"
    by_likelihood = {"classification": _classification, "preference": _preference, "perplexity": _perplexity}
    if chosen in by_likelihood:
        return by_likelihood[chosen](held_out, config, told, on_progress)
    return _answers(chosen, held_out, told, judge, max_new_tokens or METRICS[chosen], on_progress)


def _check(run: Run, config: FinetuneConfig, path: str | None, metric: str | None, judge: Judge | None) -> None:
    """Refuse before a model is loaded what could not be measured."""
    if path is None and config.valid_path is None:
        raise ConfigError(f"the run {run.name} has no valid_path: name held-out rows with data=FILE")
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"evaluate: unknown metric {metric!r}: it is one of {', '.join(METRICS)}")
    if metric == "classification" and config.classifier_config is None:
        raise ConfigError(f"metric=classification: the run {run.name} has no classifier_config with label_tokens")
    if metric == "judge" and judge is None:
        raise ConfigError("metric=judge needs judge=MODEL, and base_url=URL unless it is OpenAI's")


def _usual_metric(task: str) -> str:
    usual = {"classification": "classification", "causal_lm": "perplexity", "preference_tuning": "preference"}
    return usual.get(task, "exact_match")


def _read_as(metric: str, config: FinetuneConfig) -> str:
    """Name the task by whose rules the rows of a metric are read."""
    if metric == "perplexity" and config.task == "causal_lm":
        return "causal_lm"
    tasks = {"classification": "classification", "preference": "preference_tuning"}
    return tasks.get(metric, "instruction_tuning")


def both_models(run: Run, checkpoint: str | None = None) -> Told:
    """Yield ("base", the model a run began from), then ("tuned", its checkpoint), loaded when their turn comes.

    Raises StorageError if there is no such checkpoint, or the run is not complete and none is named.
    """
    config = load_config(run.config)
    tuned = storage.find_checkpoint(str(run.folder), None if checkpoint == "best" else checkpoint)
    began = config.initial_adapter_model_ckpt_path or config.initial_base_model_ckpt_path or config.model_id
    return zip(("base", "tuned"), _load_models([locate(began), str(tuned)], config), strict=True)


def _load_models(sources: list[str], config: FinetuneConfig) -> Iterator[LoadedModel]:
    """Load each model: with a base's weights held once where they share it, else one after the other."""
    has_own_tokens = config.classifier_config is not None
    if generate.base_of(sources[0]) == generate.base_of(sources[1]) and not has_own_tokens:
        yield from generate.load_together(sources, config.dtype, config.generation_config)
        return
    for source in sources:
        yield generate.load_together([source], config.dtype, config.generation_config)[0]
        gc.collect()  # the first model goes before the second comes


# By answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """One answer to be given; row: the number of its conversation, which may have several."""

    row: int
    messages: list[dict]
    tools: list[dict] | None
    reference: dict


def _answers(
    metric: str, held_out: list[Example], told: Told, judge: Judge | None, limit: int | None, on_progress: Tell
) -> Evaluation:
    asked = [one for number, row in enumerate(held_out) for one in _turns(number, row, metric == "tool_calls")]
    if not asked:
        raise DataError("no turn of the assistant follows a prompt in these rows, so there is nothing to ask")
    references = [said(one.reference) for one in asked]
    given = []
    for name, loaded in told:
        with loaded.active() as model:
            given.append(
                generate.complete(
                    model, loaded.tokenizer, [one.messages for one in asked], prompt_format=loaded.prompt_format,
                    tools=[one.tools for one in asked], keep_special=metric == "tool_calls",
                    max_new_tokens=limit or _room(loaded.tokenizer, references),
                    on_progress=functools.partial(_tell, on_progress, name, len(asked)),
                )
            )  # fmt: skip
        del loaded, model
    compared = Comparison([as_read(one.messages) for one in asked], references, *given)
    if metric == "judge":
        return _judged(asked, compared, judge, on_progress)
    kinds = [[_mistake(metric, one, answer) for one, answer in zip(asked, answers, strict=True)] for answers in given]
    # A conversation is right if every turn of it is; it counts once, under the kind of its first mistake.
    by_row = [_first_of_each(asked, one, len(held_out)) for one in kinds]
    right = [[kind is None for kind in one] for one in by_row]
    score = Score(metric, *map(statistics.share, right), statistics.compare_shares(*right))
    return make_evaluation(metric, [score], compared, kinds, len(held_out), by_row)


def _room(tokenizer, references: list[str]) -> int:
    """Give answers as many tokens as the longest reference has, and some more: longer ones are wrong anyway."""
    return max(128, 8 + max(map(len, tokenizer(references)["input_ids"])))


def _turns(number: int, row: Example, every: bool) -> list[_Asked]:
    """List what is to be answered of a row: its last turn, or every turn of the assistant that is to be learnt."""
    if row.messages[-1]["role"] != "assistant" and not every:
        raise DataError(f"{row.where}: messages: must end with the assistant's turn that answers are compared with")
    places = [k for k, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight") != 0]
    places = places if every else [len(row.messages) - 1]
    return [_Asked(number, row.messages[:k], row.tools, row.messages[k]) for k in places if k]


def _mistake(metric: str, asked: _Asked, answer: str) -> str | None:
    """Name what is wrong with an answer; None if it is right."""
    if metric == "tool_calls":
        return tool_accuracy.find_tool_call_mistake(answer, calls_of_message(asked.reference))
    reference = asked.reference["content"]
    if metric == "gsm8k":
        if statistics.is_gsm8k_right(answer, reference):
            return None
        return "no number after ####" if statistics.gsm8k_number(answer) is None else "wrong number"
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return None
    if not answer:
        return "empty"
    if answer.startswith(reference):
        return "goes on"
    if reference.startswith(answer):
        return "stops early"
    return "case or spaces" if "".join(answer.split()).lower() == "".join(reference.split()).lower() else "different"


def _first_of_each(asked: list[_Asked], kinds: list[str | None], rows: int) -> list[str | None]:
    first: list[str | None] = [None] * rows
    for one, kind in zip(asked, kinds, strict=True):
        first[one.row] = first[one.row] or kind
    return first


def _judged(asked: list[_Asked], compared: Comparison, judge: Judge, on_progress: Tell) -> Evaluation:
    answers = zip(compared.base, compared.tuned, compared.references, strict=True)
    pairs = [AnswerPair(one.messages, *texts) for one, texts in zip(asked, answers, strict=True)]
    won = judge_all(judge, pairs, lambda done: on_progress("judge", done, len(pairs)))
    counted = [points for points in won if points is not None]
    if not counted:
        raise ConfigError(f"the judge {judge.model} gave no verdict on any of {len(pairs)} pairs: take another model")
    wins, losses = ([points > 0.5 for points in counted], [points < 0.5 for points in counted])
    rate = statistics.share(counted)
    # McNemar's test on wins and losses is the sign test; ties say nothing.
    chance = statistics.Difference(rate.value - 0.5, statistics.compare_shares(losses, wins).p, "sign test, exact")
    lost = ["no verdict" if points is None else "lost" if points < 0.5 else None for points in won]
    beaten = ["no verdict" if points is None else "lost" if points > 0.5 else None for points in won]
    score = Score("win_rate", None, rate, chance)
    return make_evaluation("judge", [score], compared, [beaten, lost], len(counted))


# By likelihood ----------------------------------------------------------------------------------------


def _classification(held_out: list[Example], config: FinetuneConfig, told: Told, on_progress: Tell) -> Evaluation:
    labels = list(config.classifier_config.label_tokens)
    truth = np.array([labels.index(row.messages[-1]["content"]) for row in held_out])
    found = []
    for name, loaded in told:
        with loaded.active() as model:
            found.append(
                logprobs.label_probabilities(
                    model, loaded.tokenizer, held_out, labels, loaded.prompt_format,
                    functools.partial(_tell, on_progress, name, len(held_out)),
                )
            )  # fmt: skip
        del loaded, model
    picked = [probabilities.argmax(1) for probabilities in found]
    right = [one == truth for one in picked]
    made = [Score("accuracy", *map(statistics.share, right), statistics.compare_shares(*right))]
    for metric in config.classifier_config.eval_metrics:
        if metric != "accuracy":
            columns = [[probabilities, truth] for probabilities in found]
            made.append(Score(metric, *statistics.compare_statistics(_metric(metric), *columns, CLASSIFIER_RESAMPLES)))
    names = [[labels[label] for label in one] for one in picked]
    references = [labels[label] for label in truth]
    compared = Comparison([as_read(row.messages[:-1]) for row in held_out], references, *names)
    kinds = [
        [None if name == right else f"{right} taken for {name}" for name, right in zip(one, references, strict=True)]
        for one in names
    ]
    return make_evaluation("classification", made, compared, kinds)


def _metric(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda probabilities, truth: classification.score_predictions(probabilities, truth, [name])[f"eval_{name}"]


def _preference(held_out: list[Example], config: FinetuneConfig, told: Told, on_progress: Tell) -> Evaluation:
    measured, kept = _measured(held_out, config, told, on_progress)
    chosen = [sums[:, 0, 0] > sums[:, 1, 0] for sums in measured]
    score = Score("chosen_likelier", *map(statistics.share, chosen), statistics.compare_shares(*chosen))
    said_by = [[row.messages[-1]["content"], row.rejected[-1]["content"]] for row in kept]
    texts = [[pair[0 if one else 1] for pair, one in zip(said_by, ones, strict=True)] for ones in chosen]
    compared = Comparison([as_read(row.messages[:-1]) for row in kept], [pair[0] for pair in said_by], *texts)
    kinds = [[None if one else "the rejected likelier" for one in ones] for ones in chosen]
    return make_evaluation("preference", [score], compared, kinds, left_out=len(held_out) - len(kept))


def _perplexity(held_out: list[Example], config: FinetuneConfig, told: Told, on_progress: Tell) -> Evaluation:
    measured, kept = _measured(held_out, config, told, on_progress)
    (before, tokens), (after, own) = [sums[:, 0].T for sums in measured]
    score = Score("perplexity", *statistics.compare_statistics(_perplexity_of, [before, tokens], [after, own]))
    means = [-before / tokens, -after / own]
    texts = [[f"{mean:.4f} per token" for mean in one] for one in means]
    shown = [row.text if row.text is not None else as_read(row.messages) for row in kept]
    compared = Comparison(shown, [""] * len(kept), *texts)
    worse = ["foreseen worse than by the base" if one > other else None for other, one in zip(*means, strict=True)]
    kinds = [[None] * len(kept), worse]
    return make_evaluation("perplexity", [score], compared, kinds, left_out=len(held_out) - len(kept))


def _perplexity_of(logs: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.exp(-logs.sum() / tokens.sum()))


def _measured(
    held_out: list[Example], config: FinetuneConfig, told: Told, on_progress: Tell
) -> tuple[list[np.ndarray], list[Example]]:
    """Measure examples truncated as in the run; an example that truncation drops for either model is left out.

    Returns for each model [examples, conversations, 2] the log-probability and the number of the tokens in the loss
    (conversations: 1, or 2 of a pair, the chosen first), and the examples that are left.
    """
    task = config.task if held_out[0].rejected is not None or held_out[0].text is not None else "instruction_tuning"
    task = "causal_lm" if config.task == "causal_lm" else task
    group = batching.group_size(task)
    measured, kept = [], np.ones(len(held_out), bool)
    for name, loaded in told:
        options = tokenize.EncodingOptions(task, loaded.prompt_format, config.train_on, config.rewritten_turns)
        encoded = tokenize.encode_examples(held_out, loaded.tokenizer, options)
        if wrong := [str(one) for one in encoded if isinstance(one, DataError)]:
            raise DataError("\n".join(wrong[:10]))
        tokens = Tokens.from_examples((one.input_ids, one.loss_mask) for example in encoded for one in example)
        owners = np.repeat(np.arange(len(encoded)), [len(example) for example in encoded])
        if config.context_length is not None:
            fitted = fit_tokens(tokens, config.context_length, config.truncation, group)
            tokens, owners = fitted.tokens, owners[fitted.kept]
        with loaded.active() as model:
            logs = logprobs.log_probabilities(
                model,
                loaded.tokenizer,
                tokens,
                on_progress=functools.partial(_tell, on_progress, name, len(tokens)),
            )
        del loaded, model
        # Several encodings of one example (expanded turns) are summed: they are resampled together.
        sums = np.zeros((len(held_out), group, 2))
        np.add.at(sums, (owners, np.arange(len(owners)) % group), np.stack([logs, tokens.supervised], axis=1))
        measured.append(sums)
        kept &= sums[:, :, 1].all(axis=1)
    if not kept.any():
        raise DataError(f"no held-out example has a token in the loss within context_length {config.context_length}")
    return [sums[kept] for sums in measured], [one for one, stays in zip(held_out, kept, strict=True) if stays]


def _tell(on_progress: Tell, name: str, total: int, done: int) -> None:
    on_progress(name, done, total)
