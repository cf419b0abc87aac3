"""What --default chooses where the config leaves a key open, each choice with its reason. Needs no torch.

    config = choose_task(config, first_rows(config.train_path))  before the data is tokenized: task, prompt format
    config, choices = choose(config, shape, (8, gpu), data)      the rest

Values of the file or an override never change. Choices depend on the config, the data and the kind and number of GPUs
(of a CPU: its kind) alone, not on what else the machine is doing: the same command chooses the same, and so resumes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.catalog import Gpu, Shape, read_catalog
from forgebook.config.rules import auto_keys, check_rules, open_keys
from forgebook.config.schema import DEFAULT_LORA, LEARNING_RATES
from forgebook.data import readers
from forgebook.data.batching import group_size, groups_by_length, padding_in
from forgebook.data.data_sources import find_sources
from forgebook.data.row_formats import parse_row
from forgebook.errors import DataError, ModelError, ResourceError
from forgebook.models.shapes import find_shape
from forgebook.planning import schedule
from forgebook.planning.cpu_dtype import choose_cpu_dtype
from forgebook.planning.feasibility import capacity, cheapest_change, fit, longest_sequence, unpadded_lengths
from forgebook.planning.hardware import Cpu
from forgebook.planning.memory import memory_of
from forgebook.planning.token_count import Statistics

if TYPE_CHECKING:
    from forgebook.config.data_block import DataPath
    from forgebook.config.schema import FinetuneConfig

__all__ = ["KEYS", "Choice", "choices_of", "choose", "choose_task", "core_shape", "first_rows"]

KEYS = auto_keys()
# A null of these is a choice: no adapter, no quantization, no DeepSpeed. A null of any other key leaves it open.
NULL_IS_A_CHOICE = ("lora_config", "quantization", "deepspeed")

FIRST_ROWS = 20
SHORTEST_CONTEXT = 512
UNCOUNTED_CONTEXT = 4096  # for data that is not on this machine
# Examples per optimizer step: the largest of these that leaves FEWEST_STEPS steps, else the smallest.
BATCHES, FEWEST_STEPS = (64, 32, 16), 250
# Epochs by the most examples: a small data set is repeated (up to four epochs over a text teach nearly as much as new
# text, arXiv 2305.16264); preferences get one epoch, as a second one mostly memorizes them.
EPOCHS = {10_000: 3, 50_000: 2}
# Preference pairs need a twentieth of the learning rate (LLMForge's DPO with LoRA: 5e-6; Zephyr's full DPO: 5e-7).
PREFERENCE_SHARE = 0.05
# Packing is faster from this share of padding on, if the attention kernel separates examples without a mask.
MUCH_PADDING = 0.2
# A typical batch, for the estimate of padding.
SORTED_EXAMPLES, EXAMPLES_PER_BATCH = 1600, 8
# The share of a GPU's memory to leave free if possible: the plan's estimate may be too low.
MARGIN = 0.1
# Without a GPU: the bytes that a process may use on a laptop, and sequences short enough for plain attention.
LAPTOP = Cpu("a laptop", 8 * 2**30, 8 * 2**30)
EAGER_TOKENS = 512
EVALUATIONS_IN_ONE_EPOCH = 4


# Before the data is tokenized -------------------------------------------------------------------------


def first_rows(train_path: DataPath) -> list[Any]:
    """Read the first rows of the training data as they are written; unreadable ones are left out."""
    chunks = itertools.chain.from_iterable(map(readers.split_source, find_sources(train_path)))
    raw = (row for chunk in chunks for _, row in readers.read_chunk(chunk) if not isinstance(row, DataError))
    return list(itertools.islice(raw, FIRST_ROWS))


def choose_task(config: FinetuneConfig, raw: list[Any]) -> FinetuneConfig:
    """Choose the task from the first rows, and a prompt format for models that have no chat template."""
    if not config.explicit_keys & {"task", "classifier_config", "preference_tuning_config", "vision_language_config"}:
        task, reason = _task_of(raw)
        config = config.resolve(task=task).explained({"task": reason})
    prompt_format = read_catalog().formats.get(config.model_id.lower())
    has_messages = any(not (isinstance(row, dict) and "text" in row) for row in raw)
    if prompt_format and config.generation_config.prompt_format is None and has_messages:
        generation = config.generation_config.model_dump() | {"prompt_format": prompt_format}
        reason = "this model has no chat template: the format of its instruction-tuned family"
        config = config.resolve(generation_config=generation).explained({"generation_config.prompt_format": reason})
    check_rules(config, open_keys(config) - {"task"})
    return config


def _task_of(raw: list[Any]) -> tuple[str, str]:
    if not raw:
        return "causal_lm", "the data is not on this machine"
    if isinstance(raw[0], dict) and raw[0].get("chosen") is not None and raw[0].get("rejected") is not None:
        return "preference_tuning", "the examples are pairs of a chosen and a rejected answer"
    if any(_parses_as("instruction_tuning", row) for row in raw):
        return "instruction_tuning", "the examples are conversations: the loss covers their answers"
    return "causal_lm", "the examples are text without answers: the loss covers every token"


def _parses_as(task: str, raw: Any) -> bool:
    try:
        parse_row(raw, "row", task)
    except DataError:
        return False
    return True


def core_shape(model_id: str) -> Shape:
    """Return the shape of a model; raise ModelError, which lists the core models, for an unknown one."""
    try:
        return find_shape(model_id)
    except ModelError as error:
        core_models = ", ".join(["tiny", *read_catalog().shapes])
        raise ModelError(
            f"{error}. --default needs a model of a known shape: one whose config.json is on this machine or the hub, "
            f"of an architecture that transformers has. The core models: {core_models}"
        ) from None


def choose(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu] | None,
    data: Statistics | None,
    longest_valid: int = 0,
) -> tuple[FinetuneConfig, list[Choice]]:
    """Choose what a config leaves open; return it without gaps, and every choice with its reason.

    hardware: how many GPUs of which kind; None: no GPU. data: of the training examples; None: not on this machine.
    longest_valid: tokens of the longest validation example.

    Raises ResourceError if nothing fits the hardware.
    """
    if config.valid_path is None:
        config = config.explained({"valid_path": "no evaluation loss; the last checkpoint counts as the best"})
    if "lora_config" not in config.explicit_keys:
        reason = "rank 8 on all linear layers: close to full fine-tuning, with little memory"
        config = config.resolve(lora_config=dict(DEFAULT_LORA)).explained({"lora_config.r": reason})
    factor = (config.rope_scaling or {}).get("factor", 1)
    limit = int(shape.context * factor) if shape.context else None
    longest = max(data.longest, longest_valid) if data else None
    config = take(config, "context_length", *_context_for(longest, limit, config.truncation, data))
    config = take(config, "padding", *_padding_for(config.task, config.attention, data))
    config = _choose_machines(config, shape, hardware)
    config = _choose_batch(config, shape, hardware, data)
    config = _choose_schedule(config, data)
    check_rules(config)
    return config, choices_of(config)


def _sequences(padding: str, context: int | None, task: str | None, data: Statistics) -> int:
    """Count what a batch counts, over an epoch: examples, pairs, or packed sequences."""
    return math.ceil(data.tokens / _chosen(context)) if padding == "packed" else data.examples // group_size(task)


def _chosen(value: int | None) -> int:
    """Return a value that an earlier choice has filled."""
    assert value is not None
    return value


def _context_for(longest: int | None, limit: int | None, truncation: str, data: Statistics | None) -> tuple[int, str]:
    """Choose the context length, with the reason. longest: tokens of an example; limit: the model's; None: unknown."""
    longest = longest or UNCOUNTED_CONTEXT
    limit = limit or longest
    powers = [2**k for k in range(SHORTEST_CONTEXT.bit_length() - 1, limit.bit_length())]
    lengths = sorted({min(length, limit) for length in [*powers, limit]})
    context = next((length for length in lengths if length >= longest), limit)
    if data is None:
        reason = "the data is not on this machine: its longest example is not known"
    elif longest <= limit:
        choice = "the smallest power of two" if context in powers else "the model's longest context"
        reason = f"the longest example has {longest:,} tokens: {choice} that holds it"
    else:
        longer = sum(length > limit for length in data.lengths)
        effect = {"error": "rejects the run if answers would be lost", "drop": "leaves them out"}
        reason = (
            f"the model's longest; {longer:,} training examples are longer, up to {longest:,} tokens: truncation: "
            f"{truncation} {effect.get(truncation, 'cuts them')}"
        )
    return context, reason


def _padding_for(task: str | None, attention: str, data: Statistics | None) -> tuple[str, str]:
    """Choose how batches are padded, with the reason."""
    batches = "batches are grouped by length" if groups_by_length(task) else "a classifier's batches mix all lengths"
    if not data or task == "preference_tuning":
        return "longest", batches
    share = _padding_share(data.lengths, groups_by_length(task))
    if share >= MUCH_PADDING and attention in ("flash_attention_2", "flash_attention_3"):
        return "packed", f"about {share:.0%} of the batches would be padding"
    return "longest", f"{batches}: about {share:.0%} is padding"


def _padding_share(lengths: tuple[int, ...], by_length: bool) -> float:
    """Estimate the share of padding in batches of examples, if `by_length` grouped by it some thousand at a time."""
    parts = (np.array(lengths[start : start + SORTED_EXAMPLES]) for start in range(0, len(lengths), SORTED_EXAMPLES))
    ordered = (np.sort(part) if by_length else part for part in parts)
    return padding_in(
        part[k : k + EXAMPLES_PER_BATCH] for part in ordered for k in range(0, len(part), EXAMPLES_PER_BATCH)
    )


def _choose_machines(config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu] | None) -> FinetuneConfig:
    if hardware is None:
        config = take(config, "num_devices", 0, "no GPU: in this process, which starts immediately")
        is_chosen = is_open(config, "dtype")  # else there is nothing to measure
        return take(config, "dtype", *choose_cpu_dtype(shape.hidden, shape.intermediate)) if is_chosen else config
    count, gpu = hardware
    if gpu.name in read_catalog().gpus:
        config = take(config, "hardware", f"{count}x{gpu.name}", "the GPUs of this machine")
    config = take(config, "attention", "auto", "the fastest that is installed: FlashAttention, else SDPA")
    return take(config, "num_devices", count, f"all of {count}x{gpu.name}, one worker each")


def _choose_batch(
    config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu] | None, data: Statistics | None
) -> FinetuneConfig:
    micro, accumulation, batch_reason = _first_batch(config, data)
    config = config.resolve(train_batch_size_per_device=micro, gradient_accumulation_steps=accumulation)
    fixed = {key for key in KEYS if not is_open(config, key)}
    if hardware is None:
        fitted = _without_gpu(config, shape, data, fixed)
    else:
        fitted = _on_gpus(config, shape, hardware, data, fixed)
    workers, length = max(1, fitted.num_devices), longest_sequence(fitted, data)
    lengths = unpadded_lengths(fitted, shape, data, hardware[1] if hardware else None)
    need = memory_of(fitted, shape, workers=workers, length=length, on_gpu=hardware is not None, lengths=lengths)
    memory = f"{need.total / 1e9:,.1f} GB" + (f" of {capacity(hardware[1]) / 1e9:,.1f} per GPU" if hardware else "")
    only_way = f"it does not fit otherwise: {memory}"
    reasons = {
        "quantization": "the weights fit as they are" if fitted.quantization is None else only_way,
        "deepspeed": _sharding_reason(fitted.deepspeed or fitted.sharding == "fsdp", fitted.num_devices, memory),
        "gradient_checkpointing": only_way if fitted.gradient_checkpointing else "it fits without, which is faster",
        "train_batch_size_per_device": f"the largest that fits and divides the batch: {memory}",
        "gradient_accumulation_steps": f"{fitted.global_batch_size} examples per optimizer step: {batch_reason}",
    }
    fitted = fitted.explained({key: reason for key, reason in reasons.items() if key not in fixed})
    return take(fitted, "eval_batch_size_per_device", fitted.train_batch_size_per_device, "what fits in training")


def _first_batch(config: FinetuneConfig, data: Statistics | None) -> tuple[int, int, str]:
    """Choose micro batch and accumulation before it is known what fits, with the reason for the global batch."""
    target, reason = BATCHES[1], "the data is not on this machine"
    if data:
        sequences = _sequences(config.padding, config.context_length, config.task, data)
        total = sequences * (config.num_epochs or _epochs(config.task, sequences))
        target = next((n for n in BATCHES if total / n >= FEWEST_STEPS), min(BATCHES[-1], sequences))
        reason = f"{total:,} examples in all epochs give {math.ceil(total / target):,} steps"
    per_device = max(1, round(target / max(1, config.num_devices)))
    micro, accumulation = config.train_batch_size_per_device, config.gradient_accumulation_steps
    if micro is None or is_open(config, "train_batch_size_per_device"):
        return max(1, per_device // accumulation), accumulation, reason
    if is_open(config, "gradient_accumulation_steps"):
        accumulation = max(1, round(per_device / micro))
    return micro, accumulation, reason


def _without_gpu(config: FinetuneConfig, shape: Shape, data: Statistics | None, fixed: set[str]) -> FinetuneConfig:
    config = take(config, "deepspeed", None, "")
    is_short = config.padding == "longest" and data and data.longest <= EAGER_TOKENS
    if is_short and config.sequence_parallel == 1:
        config = take(config, "attention", "eager", "fastest on CPU for short sequences")
    laptop = (max(1, config.num_devices), LAPTOP)
    return fit(config, shape, laptop, data, fixed | {"deepspeed"}) or config.resolve(gradient_checkpointing=True)


def _on_gpus(
    config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu], data: Statistics | None, fixed: set[str]
) -> FinetuneConfig:
    workers, gpu = max(1, config.num_devices), hardware[1]
    for share, (values, reason) in itertools.product((1 - MARGIN, 1), _number_formats(gpu, config.is_lora, fixed)):
        smaller = dataclasses.replace(gpu, memory=int(share * gpu.memory))
        fitted = fit(config.resolve(**values), shape, (workers, smaller), data, fixed)
        if fitted is None:
            continue
        # Offloading float32 weights is slower than computing in an emulated bfloat16.
        offloads = fitted.deepspeed is not None and "offload" in fitted.deepspeed.config_path
        if not (offloads and fitted.dtype == "float32" and not gpu.bfloat16):
            return fitted.explained({"dtype": reason}) if "dtype" not in fixed else fitted
    lengths = unpadded_lengths(config, shape, data, gpu)
    changes, _ = cheapest_change(config, shape, workers, longest_sequence(config, data), gpu, lengths)
    fix = f"try {' '.join(changes)}" if changes else "use more or larger GPUs"
    raise ResourceError(f"{config.model_id} does not fit {workers}x{gpu.name} with the values of the config: {fix}")


def _number_formats(gpu: Gpu, is_lora: bool, fixed: set[str]) -> list[tuple[dict[str, Any], str]]:
    """List dtype and quantization to be tried in turn, with the reason for the dtype."""
    quantized = [{}, {"quantization": "nf4"}] if is_lora and "quantization" not in fixed else [{}]
    if "dtype" in fixed:
        return [(values, "") for values in quantized]
    if gpu.bfloat16:
        return [({"dtype": "bfloat16"} | values, f"{gpu.name} supports it") for values in quantized]
    half = f"{gpu.name} has no bfloat16, and multiplies float16 several times faster than float32"
    formats: list[tuple[dict[str, Any], str]] = [({"dtype": "float16"} | values, half) for values in quantized]
    formats.append(({"dtype": "float32"}, f"{gpu.name} has no bfloat16, and float16 does not fit or work here"))
    emulated = f"{gpu.name} has no bfloat16 and emulates it, but float16 and float32 do not fit or work here"
    return formats + [({"dtype": "bfloat16"} | values, emulated) for values in quantized]


def _sharding_reason(shards: Any, workers: int, memory: str) -> str:
    if shards:
        return f"the fastest way that fits: {memory}"
    return "one device holds everything" if workers <= 1 else f"the whole model fits every GPU: {memory}"


def _epochs(task: str | None, sequences: int) -> int:
    if task == "preference_tuning":
        return 1
    return next((epochs for most, epochs in EPOCHS.items() if sequences <= most), 1)


def _choose_schedule(config: FinetuneConfig, data: Statistics | None) -> FinetuneConfig:
    rates = read_catalog().rates.get(config.model_id.lower())
    config = take(config, "learning_rate", *_learning_rate(config.model_id, config.task, config.is_lora, rates))
    if data is None:
        return take(config, "num_epochs", 1, "the data is not on this machine")
    sequences = _sequences(config.padding, config.context_length, config.task, data)
    epoch_steps = schedule.steps_per_epoch(sequences, config.global_batch_size)
    usual, least = _epochs(config.task, sequences), schedule.epochs_for(config.min_update_steps, epoch_steps)
    reason = f"{sequences:,} examples" if usual >= least else f"min_update_steps is {config.min_update_steps}"
    config = take(config, "num_epochs", max(usual, least), f"{reason}; {epoch_steps:,} steps each")
    steps = schedule.total_steps(_chosen(config.num_epochs), epoch_steps, config.max_steps)
    reason = f"3% of {steps:,} steps, from 10 to 100; a tenth at most"
    config = take(config, "num_warmup_steps", schedule.warmup_steps(steps), reason)
    key = "checkpoint_and_evaluation_frequency"
    interval = schedule.evaluation_interval(steps, EVALUATIONS_IN_ONE_EPOCH)
    if config.num_epochs == 1 and config.valid_path is not None and interval is not None:
        frequency = {"unit": "steps", "frequency": interval}
        return take(config, key, frequency, f"{EVALUATIONS_IN_ONE_EPOCH} times in the one epoch")
    return take(config, key, None, "after every epoch")


def _learning_rate(model_id: str, task: str | None, is_lora: bool, rates: dict[str, float] | None) -> tuple[float, str]:
    """Choose the peak learning rate, with the reason. rates: the catalog's, where the model has its own."""
    rate = (rates or LEARNING_RATES)["lora" if is_lora else "full"]
    reason = "for LoRA" if is_lora else "for full fine-tuning"
    reason += f", the rate of {model_id}" if rates else ""
    if task == "preference_tuning":
        rate, reason = rate * PREFERENCE_SHARE, f"{reason}; a twentieth for preference pairs"
    return rate, reason


@dataclass(frozen=True)
class Choice:
    """One key of the config, its value, and the reason for the value."""

    key: str
    value: Any
    reason: str


def is_open(config: FinetuneConfig, key: str) -> bool:
    """Check whether the config leaves a key open."""
    return key not in config.explicit_keys or (getattr(config, key) is None and key not in NULL_IS_A_CHOICE)


def take(config: FinetuneConfig, key: str, value: Any, reason: str) -> FinetuneConfig:
    """Set a key if it is open, and note the reason."""
    return config.resolve(**{key: value}).explained({key: reason}) if is_open(config, key) else config


def choices_of(config: FinetuneConfig) -> list[Choice]:
    """List the keys that --default may choose, with their values: chosen by it or set by the config."""
    choices = []
    for key in KEYS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        origins = [origin for name, origin in config.origins.items() if name == key or name.startswith(f"{key}.")]
        reason = next((origin.removeprefix("auto: ") for origin in origins if origin.startswith("auto: ")), None)
        if reason is None and {"file", "override"} & set(origins):
            reason = "set in the config"
        if reason is not None:
            choices.append(Choice(key, _plain(value), reason))
    return choices


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
