"""What --default chooses where the config is silent, each choice with its reason. Needs no torch.

    config = choose_task(config, first_rows(config))             before the data is tokenised: task, prompt format
    config, choices = choose(config, shape, (8, gpu), data)      the rest

What the file or an override gives is never changed. Choices depend on the config, the data and the kind and number
of GPUs alone, not on what else the machine is doing: the same command chooses the same again, and so continues.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.catalog import Catalog, Gpu, Shape, read_catalog, shape_of
from forgebook.config.schema import DEFAULT_LORA, LEARNING_RATES, auto_keys
from forgebook.data import readers
from forgebook.data.batching import group_size
from forgebook.data.row_formats import parse_row
from forgebook.errors import DataError, ModelError, ResourceError
from forgebook.planning import schedule
from forgebook.planning.feasibility import capacity, cheapest_change, fit, work_of
from forgebook.planning.memory import memory_of
from forgebook.planning.token_count import Statistics

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = ["KEYS", "Choice", "choice_rows", "choices_of", "choose", "choose_task", "core_shape", "first_rows"]

KEYS = auto_keys()
# A null of these was chosen by who wrote it.
_NULL_IS_AN_ANSWER = ("lora_config", "quantization", "deepspeed")

SHORTEST_CONTEXT = 512
UNCOUNTED_CONTEXT = 4096  # of data that is not read here
# Rows per update: the most that still leave this many updates, or the fewest.
BATCHES, UPDATES = (64, 32, 16), 250
# Passes over so many rows: what is small is seen more often (four passes over a text teach nearly as much as new
# text would, arXiv 2305.16264); preferences once, as a second pass mostly learns them by heart.
EPOCHS = {10_000: 3, 50_000: 2}
# LLMForge's peak learning rates; pairs want a twentieth (its own DPO with LoRA: 5e-6; Zephyr's with all: 5e-7).
PREFERENCE_SHARE = 0.05
# Packing pays from this share of padding on, if attention knows where a packed row ends without a mask.
MUCH_PADDING = 0.2
# About as forgebook.data.batching sorts rows by length; batches are a multiple of so many tokens wide.
SORTED_ROWS, ROWS_PER_BATCH, WIDTH_STEP = 1600, 8, 16
# Of a GPU's memory, the share left free if that is possible: the plan's estimate may err.
MARGIN = 0.1
# Without a GPU: what a process may take of a laptop, in bytes, and rows short enough for plain attention.
LAPTOP = Gpu("a laptop", 8 * 2**30, 0.0, 0.0)
EAGER_TOKENS = 512
EVALUATIONS_IN_ONE_EPOCH = 4


# Before the data is tokenised -------------------------------------------------------------------------


def first_rows(config: FinetuneConfig, count: int = 20) -> list[Any]:
    """Read the first raw rows of the training data; a bad one is left out."""
    chunks = itertools.chain.from_iterable(
        readers.split_source(source.uri) for source in readers.find_sources(config.train_path)
    )
    raw = (row for chunk in chunks for _, row in readers.read_chunk(chunk) if not isinstance(row, DataError))
    return list(itertools.islice(raw, count))


def choose_task(config: FinetuneConfig, raw: list[Any], catalog: Catalog | None = None) -> FinetuneConfig:
    """Choose the task by the first rows, and a prompt format for models that have no chat template."""
    if not config.given & {"task", "classifier_config", "preference_tuning_config", "vision_language_config"}:
        task, reason = _task_of(raw)
        config = config.resolve(task=task).explained({"task": reason})
    found = (catalog or read_catalog()).formats.get(config.model_id.lower())
    talks = any(not (isinstance(row, dict) and "text" in row) for row in raw)
    if found and config.generation_config.prompt_format is None and talks:
        generation = config.generation_config.model_dump() | {"prompt_format": found}
        reason = "this model has no chat template: that of its family, tuned to follow instructions"
        config = config.resolve(generation_config=generation).explained({"generation_config.prompt_format": reason})
    return config


def _task_of(raw: list[Any]) -> tuple[str, str]:
    if not raw:
        return "causal_lm", "no row was read here"
    if isinstance(raw[0], dict) and raw[0].get("chosen") is not None and raw[0].get("rejected") is not None:
        return "preference_tuning", "the rows are pairs of a chosen and a rejected answer"
    if any(_is_row_of("instruction_tuning", row) for row in raw):
        return "instruction_tuning", "the rows are conversations: their answers are trained"
    return "causal_lm", "the rows are text without answers: every token is trained"


def _is_row_of(task: str, raw: Any) -> bool:
    try:
        parse_row(raw, "row", task)
    except DataError:
        return False
    return True


def core_shape(config: FinetuneConfig, catalog: Catalog | None = None) -> Shape:
    """Find the shape of a core model; raise ModelError, which names them all, for another."""
    try:
        return shape_of(config.model_id, catalog)
    except ModelError as error:
        named = ", ".join(["tiny", *(catalog or read_catalog()).shapes])
        raise ModelError(
            f"{error}. --default chooses for models of a known shape alone; custom mode, without --default, takes any "
            f"model, with a config that says the rest. The core models: {named}"
        ) from None


# The rest ---------------------------------------------------------------------------------------------


def choose(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu] | None,
    data: Statistics | None,
    longest_valid: int = 0,
    catalog: Catalog | None = None,
) -> tuple[FinetuneConfig, list[Choice]]:
    """Choose what a config leaves open; return it without gaps, and every choice with its reason.

    hardware: how many GPUs of which kind; None: no GPU. data: of the training rows; None: not to be read here.
    longest_valid: tokens of the longest validation row.

    Raises ResourceError if nothing fits the hardware.
    """
    catalog = catalog or read_catalog()
    if config.valid_path is None:
        config = config.explained({"valid_path": "no evaluation loss; the last checkpoint counts as the best"})
    if "lora_config" not in config.given:
        reason = "rank 8 on all linear layers: learns about what all weights would, with little memory"
        config = config.resolve(lora_config=dict(DEFAULT_LORA)).explained({"lora_config.r": reason})
    config = _choose_length(config, shape, data, longest_valid)
    config = _choose_machines(config, hardware, catalog)
    config = _choose_batch(config, shape, hardware, data)
    config = _choose_course(config, data, catalog)
    return config, choices_of(config)


def _sequences(config: FinetuneConfig, data: Statistics) -> int:
    """Count what a batch counts, over an epoch: rows, pairs, or packed sequences."""
    if config.padding == "packed":
        return math.ceil(data.tokens / config.context_length)
    return data.rows // group_size(config.task)


# -- how long, how filled


def _choose_length(config, shape: Shape, data: Statistics | None, longest_valid: int) -> FinetuneConfig:
    longest = max(data.longest, longest_valid) if data else UNCOUNTED_CONTEXT
    factor = (config.rope_scaling or {}).get("factor", 1)
    limit = int((shape.context or longest) * factor)
    powers = [2**k for k in range(SHORTEST_CONTEXT.bit_length() - 1, limit.bit_length())]
    lengths = sorted({min(length, limit) for length in [*powers, limit]})
    context = next((length for length in lengths if length >= longest), limit)
    if data is None:
        reason = "the data is not read here: its longest row is not known"
    elif longest <= limit:
        what = "power of two" if context in powers else "length that the model knows"
        reason = f"the longest row has {longest:,} tokens: the smallest {what} that holds it"
    else:
        longer = sum(length > limit for length in data.lengths)
        fate = {"error": "refuses the run if answers would be lost", "drop": "leaves them out"}
        reason = (
            f"the model's longest; {longer:,} training rows are longer, up to {longest:,} tokens: truncation: "
            f"{config.truncation} {fate.get(config.truncation, 'cuts them')}"
        )
    config = take(config, "context_length", context, reason)
    if not data or config.task == "preference_tuning":
        return take(config, "padding", "longest", "rows of like length share a batch")
    share = _padding_share(data.lengths)
    if share >= MUCH_PADDING and config.attention in ("flash_attention_2", "flash_attention_3"):
        return take(config, "padding", "packed", f"about {share:.0%} of the batches would be padding")
    return take(config, "padding", "longest", f"rows of like length share a batch: about {share:.0%} is padding")


def _padding_share(lengths: tuple[int, ...]) -> float:
    """Tell the share of padding in batches of rows that were sorted by length, some thousand at a time."""
    padded = 0
    for start in range(0, len(lengths), SORTED_ROWS):
        part = sorted(lengths[start : start + SORTED_ROWS])
        batches = [part[k : k + ROWS_PER_BATCH] for k in range(0, len(part), ROWS_PER_BATCH)]
        padded += sum(math.ceil(batch[-1] / WIDTH_STEP) * WIDTH_STEP * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded


# -- on what


def _choose_machines(config, hardware: tuple[int, Gpu] | None, catalog: Catalog) -> FinetuneConfig:
    if hardware is None:
        config = take(config, "num_devices", 0, "no GPU: in this process, which starts at once")
        return take(config, "dtype", "float32", "exact, and on most processors the fastest")
    count, gpu = hardware
    if gpu.name in catalog.gpus:
        config = take(config, "hardware", f"{count}x{gpu.name}", "found on this machine")
    config = take(config, "attention", "auto", "the fastest that is installed: flash attention, else SDPA")
    return take(config, "num_devices", count, f"all of {count}x{gpu.name}, a worker each")


# -- in what portions


def _choose_batch(config, shape: Shape, hardware: tuple[int, Gpu] | None, data: Statistics | None) -> FinetuneConfig:
    micro, accumulation, rows_reason = _portions(config, data)
    config = config.resolve(train_batch_size_per_device=micro, gradient_accumulation_steps=accumulation)
    kept = {key for key in KEYS if not is_open(config, key)}
    if hardware is None:
        fitted = _without_gpu(config, shape, data, kept)
    else:
        fitted = _on_gpus(config, shape, hardware, data, kept)
    need = memory_of(
        fitted, shape, workers=max(1, fitted.num_devices), on_gpu=hardware is not None,
        length=work_of(fitted, data).longest if data else fitted.context_length,
    )  # fmt: skip
    room = f"{need.total / 1e9:,.1f} GB" + (f" of {capacity(hardware[1]) / 1e9:,.1f} per GPU" if hardware else "")
    is_alone = fitted.num_devices <= 1
    reasons = {
        "quantization": "the weights fit as they are" if fitted.quantization is None else f"fits only so: {room}",
        "deepspeed": _sharding_reason(fitted, is_alone, room),
        "gradient_checkpointing": f"fits only so: {room}" if fitted.gradient_checkpointing else "fits without: faster",
        "train_batch_size_per_device": f"the most that fit and are asked for: {room}",
        "gradient_accumulation_steps": f"{fitted.global_batch_size} rows per update: {rows_reason}",
    }
    fitted = fitted.explained({key: reason for key, reason in reasons.items() if key not in kept})
    return take(fitted, "eval_batch_size_per_device", fitted.train_batch_size_per_device, "what fits in training")


def _portions(config: FinetuneConfig, data: Statistics | None) -> tuple[int, int, str]:
    """Choose micro batch and accumulation, before it is known what fits, and say why so many rows per update."""
    target, reason = BATCHES[1], "the data is not counted here"
    if data:
        sequences = _sequences(config, data)
        seen = sequences * (config.num_epochs or _epochs(config, sequences))
        target = next((n for n in BATCHES if seen / n >= UPDATES), min(BATCHES[-1], sequences))
        reason = f"{seen:,} rows in all give {math.ceil(seen / target):,} updates"
    each = max(1, round(target / max(1, config.num_devices)))
    micro, accumulation = config.train_batch_size_per_device, config.gradient_accumulation_steps
    if is_open(config, "train_batch_size_per_device"):
        micro = max(1, each // accumulation)
    elif is_open(config, "gradient_accumulation_steps"):
        accumulation = max(1, round(each / micro))
    return micro, accumulation, reason


def _without_gpu(config, shape: Shape, data: Statistics | None, kept: set[str]) -> FinetuneConfig:
    config = take(config, "deepspeed", None, "")
    if config.padding == "longest" and data and data.longest <= EAGER_TOKENS:
        config = take(config, "attention", "eager", "on a processor the fastest for short rows")
    found = fit(config, shape, (max(1, config.num_devices), LAPTOP), data, kept | {"deepspeed"})
    return found or config.resolve(gradient_checkpointing=True)


def _on_gpus(config, shape: Shape, hardware: tuple[int, Gpu], data, kept: set[str]) -> FinetuneConfig:
    gpu = hardware[1]
    workers = (max(1, config.num_devices), gpu)
    for share, (way, reason) in itertools.product((1 - MARGIN, 1), _ways(config, gpu, kept)):
        room = dataclasses.replace(gpu, memory=int(share * gpu.memory))
        found = fit(config.resolve(**way), shape, (workers[0], room), data, kept)
        # Moving float32 weights back and forth is slower than computing in an emulated bfloat16.
        if found is not None and not (found.dtype == "float32" and not gpu.bfloat16 and _moves(found)):
            return found.explained({"dtype": reason}) if "dtype" not in kept else found
    length = work_of(config, data).longest if data else config.context_length
    changes, _ = cheapest_change(config, shape, workers[0], length, gpu)
    mend = f"try {' '.join(changes)}" if changes else "take more or larger GPUs"
    raise ResourceError(f"{config.model_id} does not fit {workers[0]}x{gpu.name} with what the config gives: {mend}")


def _ways(config: FinetuneConfig, gpu: Gpu, kept: set[str]):
    """List dtype and quantisation to be tried in turn, with the reason for the dtype."""
    ways = [({"dtype": "bfloat16"}, f"{gpu.name} computes in it")]
    if not gpu.bfloat16:
        emulated = f"{gpu.name} has no bfloat16 and emulates it, but float32 does not fit"
        ways = [({"dtype": "float32"}, f"{gpu.name} has no bfloat16"), ({"dtype": "bfloat16"}, emulated)]
    if "dtype" in kept:
        ways = [({}, "")]
    if config.is_lora and "quantization" not in kept:
        ways += [(ways[-1][0] | {"quantization": "nf4"}, ways[-1][1])]
    return ways


def _moves(config: FinetuneConfig) -> bool:
    return config.deepspeed is not None and "offload" in config.deepspeed.config_path


def _sharding_reason(config: FinetuneConfig, is_alone: bool, room: str) -> str:
    if config.deepspeed is None:
        return "one device holds all" if is_alone else f"every GPU holds the whole model, the fastest way: {room}"
    return f"the fastest way that fits: {room}"


# -- how fast, how often


def _epochs(config: FinetuneConfig, sequences: int) -> int:
    if config.task == "preference_tuning":
        return 1
    return next((epochs for most, epochs in EPOCHS.items() if sequences <= most), 1)


def _choose_course(config: FinetuneConfig, data: Statistics | None, catalog: Catalog) -> FinetuneConfig:
    kind = "lora" if config.is_lora else "full"
    rates = catalog.rates.get(config.model_id.lower())
    rate = (rates or LEARNING_RATES)[kind]
    reason = "for LoRA" if config.is_lora else "for all weights"
    reason += f", as {config.model_id} likes it" if rates else ""
    if config.task == "preference_tuning":
        rate, reason = rate * PREFERENCE_SHARE, f"{reason}; a twentieth for pairs"
    config = take(config, "learning_rate", rate, reason)
    if data is None:
        return take(config, "num_epochs", 1, "the data is not counted here")
    sequences = _sequences(config, data)
    each = schedule.steps_per_epoch(sequences, config.global_batch_size)
    usual, least = _epochs(config, sequences), schedule.epochs_for(config.min_update_steps, each)
    reason = f"{sequences:,} rows" if usual >= least else f"min_update_steps asks for {config.min_update_steps}"
    config = take(config, "num_epochs", max(usual, least), f"{reason}; {each:,} updates each")
    steps = schedule.total_steps(config.num_epochs, each, config.max_steps)
    reason = f"3% of {steps:,} steps, from 10 to 100; a tenth at most"
    config = take(config, "num_warmup_steps", schedule.warmup_steps(steps), reason)
    key = "checkpoint_and_evaluation_frequency"
    interval = schedule.evaluation_interval(steps, EVALUATIONS_IN_ONE_EPOCH)
    if config.num_epochs == 1 and config.valid_path is not None and interval is not None:
        every = {"unit": "steps", "frequency": interval}
        return take(config, key, every, f"{EVALUATIONS_IN_ONE_EPOCH} times in the one epoch")
    return take(config, key, None, "after every epoch")


# The choices, with their reasons -------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One key of the config, its value, and why it has it."""

    key: str
    value: Any
    reason: str


def is_open(config: FinetuneConfig, key: str) -> bool:
    """Tell whether the config leaves a key to the program."""
    return key not in config.given or (getattr(config, key) is None and key not in _NULL_IS_AN_ANSWER)


def take(config: FinetuneConfig, key: str, value: Any, reason: str) -> FinetuneConfig:
    """Set a key that is open, and note the reason."""
    return config.resolve(**{key: value}).explained({key: reason}) if is_open(config, key) else config


def choices_of(config: FinetuneConfig) -> list[Choice]:
    """List what was chosen and what was given of the keys that --default looks at, in the order of the table."""
    told = []
    for key in KEYS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        origins = [one for name, one in config.origins.items() if name == key or name.startswith(f"{key}.")]
        reason = next((one.removeprefix("auto: ") for one in origins if one.startswith("auto: ")), None)
        if reason is None and {"file", "override"} & set(origins):
            reason = "given"
        if reason is not None:
            told.append(Choice(key, _plain(value), reason))
    return told


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def choice_rows(choices: list[Choice]) -> list[list[str]]:
    """Lay choices out as lines of a table: key, value, reason."""
    return [[choice.key, _shown(choice), choice.reason] for choice in choices]


def _shown(choice: Choice) -> str:
    value = choice.value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if choice.key == "deepspeed":
        return Path(value["config_path"]).stem
    if choice.key == "lora_config":
        return ", ".join(f"{name} {one}" for name, one in value.items())
    if choice.key == "generation_config.prompt_format":
        return value["user"].replace("\n", "\\n")
    if choice.key == "checkpoint_and_evaluation_frequency":
        return f"{value['frequency']} {value['unit']}"
    return f"{value:g}" if isinstance(value, float) else str(value)
