"""What notebooks call, in one flat list. The engine behind it and behind `main.py` is `forgebook/`.

A run is its name under `runs/`, or its folder. A name is loaded when it is first used: `import helpers` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and mypy ("as": they are exported); at run time _ENGINE has the same
    from forgebook.catalog import read_catalog as read_catalog
    from forgebook.config.parse import load_config as load_config
    from forgebook.config.schema import FinetuneConfig
    from forgebook.data.batching import make_batch as make_batch
    from forgebook.data.chat_template import render as render
    from forgebook.data.examples import read_examples as read_examples
    from forgebook.data.masking import encode as encode
    from forgebook.data.masking import encode_prompt as encode_prompt
    from forgebook.data.preview import show_example as show_example
    from forgebook.data.tool_accuracy import find_tool_call_mistake as find_tool_call_mistake
    from forgebook.data.tools import calls_of_message as calls_of_message
    from forgebook.errors import DataError as DataError
    from forgebook.evaluation.statistics import compare_shares as compare_shares
    from forgebook.evaluation.statistics import estimate as estimate
    from forgebook.evaluation.statistics import gsm8k_number as gsm8k_number
    from forgebook.inference.loading import LoadedModel
    from forgebook.inference.vllm_command import vllm_command as vllm_command
    from forgebook.models.load import load_model as load_model
    from forgebook.models.tokenizer import load_tokenizer as load_tokenizer
    from forgebook.planning.plan import Plan
    from forgebook.planning.plan import cost_per_million_tokens as cost_per_million_tokens
    from forgebook.planning.prepare import Prepared
    from forgebook.reporting.plots import plot_bars as plot_bars
    from forgebook.reporting.plots import plot_histogram as plot_histogram
    from forgebook.reporting.plots import plot_lines as plot_lines
    from forgebook.runs.metrics import read_curve as read_curve
    from forgebook.runs.run import find_checkpoint as find_checkpoint
    from forgebook.training.optimizers import learning_rates as learning_rates

# The engine's own names: the module, and what the name is for.
_ENGINE = {
    "DataError": ("errors", "raised for training data that cannot be used; its message names file:line"),
    "calls_of_message": ("data.tools", "the tool calls of a message"),
    "compare_shares": ("evaluation.statistics", "whether two models differ in right answers: McNemar's exact test"),
    "cost_per_million_tokens": ("planning.plan", "USD per million tokens, from USD per hour and tokens/s"),
    "encode": ("data.masking", "a conversation as token ids and loss mask"),
    "encode_prompt": ("data.masking", "a conversation as token ids, up to where the answer begins"),
    "estimate": ("evaluation.statistics", "a mean with its 95% confidence interval"),
    "find_checkpoint": ("runs.run", "the folder of a run's best checkpoint, or of the one named"),
    "find_tool_call_mistake": ("data.tool_accuracy", "what is wrong with an answer's tool calls, if anything"),
    "gsm8k_number": ("evaluation.statistics", "the final number of a GSM8K answer, by its authors' rule"),
    "learning_rates": ("training.optimizers", "the learning rate of every step of a schedule"),
    "load_config": ("config.parse", "a config file with `key=value` overrides, checked"),
    "load_model": ("models.load", "a model's weights, as a transformers model"),
    "load_tokenizer": ("models.tokenizer", "the tokenizer of a model or checkpoint folder"),
    "make_batch": ("data.batching", "encoded examples as tensors, labels shifted"),
    "plot_bars": ("reporting.plots", "one bar, or one group of bars, per name"),
    "plot_histogram": ("reporting.plots", "how often values occur, some of them marked"),
    "plot_lines": ("reporting.plots", "one curve per name"),
    "read_catalog": ("catalog", "GPUs with memory, peak and price; shapes of known models"),
    "read_curve": ("runs.metrics", "a metric of a run: (steps, values)"),
    "read_examples": ("data.examples", "the examples of a file, pattern, bucket or hub data set, checked"),
    "render": ("data.chat_template", "a conversation as text, by the chat template or a prompt format"),
    "show_example": ("data.preview", "a conversation as a model or a config file encodes it, the loss highlighted"),
    "vllm_command": ("inference.vllm_command", "the command that serves models with vLLM"),
}


def prepare_data(config: FinetuneConfig) -> Prepared:
    """Tokenize a config's data as its run does before the first step: tokens (.train, .valid) and .report."""
    from forgebook.planning.prepare import prepare
    from forgebook.runs.run import open_run

    return prepare(config, open_run(config))


def plan(config: FinetuneConfig, hardware: str | None = None) -> Plan:
    """Plan memory, time and cost on hardware such as "8xA100-80G", else on what the config names; reads no data."""
    from forgebook.catalog import hardware_of
    from forgebook.models.shapes import find_shape
    from forgebook.planning.hardware import hardware_in
    from forgebook.planning.plan import plan

    return plan(config, find_shape(config.model_id), hardware_of(hardware) if hardware else hardware_in(config))


def fit(config: FinetuneConfig, hardware: str) -> FinetuneConfig | None:
    """Find the fastest settings with which a config fits hardware such as "4xA10G"; None if none do."""
    from forgebook.catalog import hardware_of
    from forgebook.models.shapes import find_shape
    from forgebook.planning.feasibility import fit

    return fit(config, find_shape(config.model_id), hardware_of(hardware))


def load_for_generation(name: str | Path) -> LoadedModel:
    """Load a run's best checkpoint, or a model: .model, .tokenizer, .answer(conversations, max_new_tokens=64)."""
    from forgebook.inference.loading import find_model, load_together

    return load_together([find_model(str(name))])[0]


__all__ = sorted([*_ENGINE, *(name for name, one in globals().items() if getattr(one, "__module__", "") == __name__)])
__doc__ = f"{__doc__}\n" + "\n".join(f"    {name:<25}{purpose}" for name, (_, purpose) in _ENGINE.items())


def __getattr__(name: str) -> Any:
    if name not in _ENGINE:
        raise AttributeError(f"helpers has no {name}")
    return getattr(importlib.import_module(f"forgebook.{_ENGINE[name][0]}"), name)


def __dir__() -> list[str]:
    return __all__
