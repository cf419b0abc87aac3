"""What the notebooks call. The engine behind `main.py` is `forgebook/`; nothing else here is code.

from helpers import encode, load_tokenizer, show
"""

import importlib

_FROM = {
    "forgebook.catalog": "TINY_MODEL hardware_of read_catalog shape_of",
    "forgebook.errors": "DataError",
    "forgebook.config.parse": "load_config",
    "forgebook.runs.atomic": "read_json",
    "forgebook.runs.run": "find_run open_run",
    "forgebook.runs.metrics": "read_metrics",
    "forgebook.models.load": "load_model",
    "forgebook.models.tokenizer": "load_tokenizer tokenizer_of",
    "forgebook.data.readers": "find_sources",
    "forgebook.data.row_formats": "parse_row",
    "forgebook.data.chat_template": "render",
    "forgebook.data.masking": "encode encode_prompt",
    "forgebook.data.preview": "show",
    "forgebook.data.tokenize": "Recipe read_rows tokenize",
    "forgebook.data.token_store": "Tokens truncation_losses",
    "forgebook.data.batching": "collate make_sequences padding_share",
    "forgebook.data.tools": "calls_of_message",
    "forgebook.planning.plan": "cost_per_million_tokens plan",
    "forgebook.planning.feasibility": "fit",
    "forgebook.planning.prepare": "prepare",
    "forgebook.training.optimizers": "learning_rates",
    "forgebook.training.classification": "label_ids scores",
    "forgebook.inference.generate": "complete find_model load_for_generation load_together",
    "forgebook.inference.vllm_command": "vllm_command",
    "forgebook.evaluation.tool_accuracy": "KINDS find_mistake",
    "forgebook.evaluation.statistics": "bootstrap compare_shares gsm8k_number is_gsm8k_right share",
    "forgebook.reporting.plots": "COLORS new_figure plot_bars plot_lines plot_losses",
    "forgebook.launch.ray_jobs": "status",
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"helpers has no {name}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__():
    return __all__
