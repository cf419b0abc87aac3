"""Write the plan of each config into its header, and of all into the table of training_configs/README.md.

    python training_configs/make_headers.py                   the same as `make configs`
    python training_configs/make_headers.py count FILE...     lengths of GSM8K -> gsm8k_lengths.json, once

Only the lines between two marks are written; the rest of a file is its author's. Where LLMForge's file had other
values, a file lists them above its marks, for this script: `# LLMForge: key=value ...`.
"""

from __future__ import annotations

import functools
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.catalog import Gpu, Shape, read_catalog, shape_of  # noqa: E402
from forgebook.config.parse import load_config  # noqa: E402
from forgebook.config.schema import FinetuneConfig  # noqa: E402
from forgebook.planning.auto_config import choose, choose_task  # noqa: E402
from forgebook.planning.hardware import hardware_in  # noqa: E402
from forgebook.planning.plan import MFU, Plan, plan  # noqa: E402
from forgebook.planning.plan_report import format_duration  # noqa: E402
from forgebook.planning.token_count import Statistics, count_data  # noqa: E402

FOLDER = REPOSITORY / "training_configs"
README = FOLDER / "README.md"
LENGTHS = FOLDER / "gsm8k_lengths.json"
START, END = "# -- plan (`make configs` writes these lines)", "# -- end of plan"
TABLE_START, TABLE_END = "<!-- table (`make configs` writes it) -->", "<!-- end of table -->"

# The folders with a plan, as the tables' titles; models that came before those of 2024 stand last in theirs.
SECTIONS = {
    "real": "Current models",
    "default": "Default mode (`--default`): a model and data, everything else chosen",
    "custom": "Custom mode: LLMForge's configs and others",
}
OLDER = re.compile("Llama-2-|Mistral-7B/|Mixtral")
TABLE_HEAD = [
    "| config | method | hardware | context | epochs | memory per GPU | GSM8K takes | GSM8K costs | 1M tokens |",
    "|---|---|---|---|---|---|---|---|---|",
]

AN_EXAMPLE = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "#### 4"}]}


@dataclass(frozen=True)
class Facts:
    """The plans of one config. gpus: all that it needs, with those of a preference run's reference model.

    worst: planned with every sequence as long as the context; gsm8k: with GSM8K's examples; theirs: with LLMForge's
    values. faster: of a config that offloads, the sharding that offloads less and fits as well.
    """

    path: Path
    config: FinetuneConfig
    gpu: Gpu
    gpus: int
    worst: Plan
    gsm8k: Plan
    theirs: tuple[list[str], Plan] | None
    faster: tuple[str, Plan] | None

    @property
    def hardware(self) -> str:
        """Return the GPUs to rent."""
        return f"{self.gpus}x{self.gpu.name}"

    @property
    def seconds(self) -> float:
        """Return how long GSM8K takes."""
        return next(one.seconds for one in self.gsm8k.costs if one.gpu == self.gpu.name)

    @property
    def cost_per_million(self) -> float:
        """Return USD per million tokens, at the length of `worst`."""
        million = next(one.cost_per_million_tokens for one in self.worst.costs if one.gpu == self.gpu.name)
        return million * self.gpus / self.worst.workers

    @property
    def cost(self) -> float:
        """Return what GSM8K costs, in USD."""
        return self.seconds / 3600 * self.gpus * self.gpu.price


def config_paths() -> list[Path]:
    """List the configs that have a plan in their header: all but those for a CPU."""
    paths = FOLDER.glob("*/**/*.yaml")
    return sorted(path for path in paths if "tiny" not in path.parts and not path.name.startswith("cpu-"))


@functools.cache
def gsm8k() -> Statistics:
    """Read GSM8K's lengths, in a fixed random order: its batches are padded."""
    facts = json.loads(LENGTHS.read_text(encoding="utf-8"))
    lengths = [int(length) for length, rows in facts["rows_by_length"].items() for _ in range(rows)]
    random.Random(0).shuffle(lengths)
    return Statistics(tuple(lengths), 1.0, facts["how"])


@functools.cache
def facts_of(path: Path) -> Facts:
    """Plan one config, offline."""
    is_default = "default" in path.relative_to(FOLDER).parts
    text = path.read_text(encoding="utf-8")
    config = load_config(path, default=is_default)
    hardware = hardware_in(config)
    data = gsm8k()
    if config.task == "preference_tuning":  # each example is a pair of answers of its length
        data = Statistics(tuple(length for length in data.lengths for _ in range(2)), data.scale, data.how)
    if is_default:  # as on that hardware with these examples, which are conversations
        config, _ = choose(choose_task(config, [AN_EXAMPLE]), shape_of(config.model_id), hardware, data)
    # Default mode chooses the context from the data; elsewhere memory must suffice for sequences that fill the context.
    longest = data if is_default else None
    differs = re.search(r"^# LLMForge: (.+)$", text, flags=re.MULTILINE)
    theirs = None
    if differs:
        overrides = differs[1].split()
        other = load_config(path, overrides, default=is_default)
        theirs = overrides, _plan_on_the_gpu(other, shape_of(other.model_id), hardware, longest)
    shape = shape_of(config.model_id)
    return Facts(
        path, config, hardware[1], hardware[0] + _reference_gpus(config), plan(config, shape, hardware, longest),
        plan(config, shape, hardware, data), theirs, None if is_default else _faster(config, shape, hardware),
    )  # fmt: skip


def _faster(config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu]) -> tuple[str, Plan] | None:
    if not _offloads(config):
        return None
    names = ["zero_2", "zero_3"] + ["zero_3_offload_optim"] * ("param" in config.deepspeed.config_path)
    plans = ((name, _plan_on_the_gpu(config.resolve(deepspeed=name), shape, hardware)) for name in names)
    return next(((name, tried) for name, tried in plans if tried.fits), None)


def _plan_on_the_gpu(
    config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu], data: Statistics | None = None
) -> Plan:
    """Plan with activations on the GPU: auto would move them to the host where nothing else makes a run fit."""
    if config.gradient_checkpointing == "auto":
        recomputing = plan(config.resolve(gradient_checkpointing=True), shape, hardware, data)
        if not recomputing.fits:
            return recomputing
    return plan(config, shape, hardware, data)


def _offloads(config: FinetuneConfig) -> bool:
    return config.deepspeed is not None and "offload" in config.deepspeed.config_path


def _reference_gpus(config: FinetuneConfig) -> int:
    block = config.preference_tuning_config
    return block.logprob_processor_scaling_config.concurrency if block and block.logprob_processor_scaling_config else 0


# The header -------------------------------------------------------------------------------------------


def header(facts: Facts) -> list[str]:
    """Format the lines between the marks of one config."""
    worst, rows = facts.worst, facts.gsm8k
    length = f"sequences of {worst.longest_sequence:,} tokens" if worst.longest_sequence < worst.context_length else (
        f"sequences as long as the context, {worst.context_length:,} tokens"
    )  # fmt: skip
    verdict = "" if worst.fits else "; IT DOES NOT FIT"
    lines = [
        f"hardware  {facts.hardware}, ${facts.gpus * facts.gpu.price:,.2f} per hour",
        f"memory    {_gb(worst.memory.total)} per GPU of {_gb(worst.capacity)} usable, most of it "
        f"{worst.memory.largest}, at {length}{verdict}",
        f"          {_gb(worst.memory.host)} per worker on the host; {_gb(worst.disk_bytes)} on disk",
        f"GSM8K     {rows.steps:,} steps, {format_duration(facts.seconds)}, ${facts.cost:,.2f}; "
        f"${facts.cost_per_million:,.2f} per million tokens at the length above",
        f"          assumes {MFU:.0%} MFU; {read_catalog().priced}",
    ]
    if _offloads(facts.config):
        lines.append("          and that offloading takes no time: two or three times as long is likely")
    if facts.faster:
        name, planned = facts.faster
        lines.append(f"faster    deepspeed={name} fits as well, {_gb(planned.memory.total)} per GPU, and offloads less")
    if facts.theirs:
        overrides, planned = facts.theirs
        fit = "fits as well" if planned.fits else "does not fit"
        lines.append(f"LLMForge  its {' '.join(overrides)} takes {_gb(planned.memory.total)} per GPU: it {fit};")
        is_applied = load_config(facts.path, " ".join(planned.changes).split()) == facts.config
        if planned.fits:
            lines.append(f"          here: {_here(overrides, facts.config)}")
        else:
            changes = " ".join(planned.changes) or "none"
            here = "applied here" if is_applied else f"here instead: {_here(overrides, facts.config)}"
            lines.append(f"          the cheapest change that plan names: {changes}, {here}")
    return [f"# {line}" for line in lines]


def _here(overrides: list[str], config: FinetuneConfig) -> str:
    return " ".join(f"{key}={getattr(config, key)}" for key in (one.partition("=")[0] for one in overrides))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


# The table --------------------------------------------------------------------------------------------


def table() -> list[str]:
    """Format the tables of all configs, as Markdown: a table per folder, current models first."""
    lines = []
    for folder, title in SECTIONS.items():
        lines += ["", f"### {title}", "", *TABLE_HEAD]
        paths = [path for path in config_paths() if path.relative_to(FOLDER).parts[0] == folder]
        for facts in map(facts_of, sorted(paths, key=lambda path: (bool(OLDER.search(str(path))), path))):
            name = facts.path.relative_to(FOLDER)
            context = f"{facts.config.context_length:,}" if facts.config.context_length else "chosen"
            offloads = " \\*" * _offloads(facts.config)
            title = name.relative_to(folder).with_suffix("")
            lines.append(
                f"| [{title}]({name}) | {_method(facts.config)} | {facts.hardware} | "
                f"{context} | {facts.config.num_epochs} | "
                f"{facts.worst.memory.total / 1e9:.0f} of {facts.worst.capacity / 1e9:.0f} GB | "
                f"{format_duration(facts.seconds)}{offloads} | ${facts.cost:,.2f}{offloads} | "
                f"${facts.cost_per_million:,.2f}{offloads} |"
            )
    return lines


def _method(config: FinetuneConfig) -> str:
    return "full" if not config.is_lora else "QLoRA" if config.quantization else "LoRA"


# Writing ----------------------------------------------------------------------------------------------


def between(text: str, start: str, end: str, lines: list[str], where: Path) -> str:
    """Replace the lines between two marks. Raises SystemExit where the marks are missing."""
    before, found, rest = text.partition(f"{start}\n")
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{where}: needs the lines {start!r} and {end!r}, between which the plan is written")
    return "\n".join([before + start, *lines, end + after])


def written(path: Path) -> str:
    """Return the text that a config, or the README, is to have."""
    text = path.read_text(encoding="utf-8")
    if path == README:
        return between(text, TABLE_START, TABLE_END, table(), path)
    return between(text, START, END, header(facts_of(path)), path)


def count(files: list[str]) -> None:
    """Count the examples of GSM8K by length, as the plan does for a model whose tokenizer is not on this machine."""
    config = FinetuneConfig(model_id="any", train_path=files, task="instruction_tuning")
    data = count_data(config)
    facts = {"how": data.how, "rows": data.examples, "rows_by_length": dict(sorted(Counter(data.lengths).items()))}
    LENGTHS.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Count, or rewrite what is out of date."""
    if arguments[:1] == ["count"]:
        count(arguments[1:])
        return
    for path in [*config_paths(), README]:
        text = written(path)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main(sys.argv[1:])
