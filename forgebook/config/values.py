"""The kinds of values that the keys of a config take: numbers, switches, names, and the blocks of other libraries.

Each is a type of pydantic: `learning_rate: Float`. Nothing here reads a file or needs a GPU stack.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from forgebook.config.lora_block import lora_problems, lora_schema
from forgebook.errors import near_miss, shown_value

__all__ = [
    "AnswerMetric",
    "BestMetric",
    "Examples",
    "Float",
    "Fraction",
    "Int",
    "LoraBlock",
    "Positive",
    "Recomputation",
    "Resources",
    "RopeBlock",
    "RunName",
    "Switch",
]

_ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_KEYS = frozenset(
    """
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor low_freq_factor mscale mscale_all_dim
    original_max_position_embeddings partial_rotary_factor rope_theta rope_type short_factor truncate
    """.split()
)
HIGHEST = 2**63  # of whole numbers; no count or seed of torch is larger
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """Turn `1e-4` into a number: YAML 1.1, hence PyYAML, reads it as text."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _whole_number(value: Any) -> Any:
    """Turn `1e3` into 1000; leave 1.5 for pydantic to reject."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numbers_inside(value: Any) -> Any:
    """Turn `1e-4` into a number at any depth of a free-form block."""
    if isinstance(value, dict):
        return {key: _numbers_inside(item) for key, item in value.items()}
    return [_numbers_inside(item) for item in value] if isinstance(value, list) else _number(value)


def _metric(value: Any) -> Any:
    """Take `tool_accuracy` for what it is here: the share of answers with the right tool calls."""
    return "tool_calls" if value == "tool_accuracy" else value


def _amount(value: Any) -> Any:
    """Read a number, 0 or more; whole numbers stay whole: 53687091200 bytes are not 53687091200.0."""
    value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < HIGHEST:
        raise ValueError(f"got {shown_value(value)}, must be a number, 0 or more")
    return value


def _switch_or_block(value: Any) -> Any:
    """Accept true, false or a block of options."""
    if not isinstance(value, bool | dict):
        raise ValueError(f"got {shown_value(value)}, must be true, false or a block of options")
    return _numbers_inside(value)


def _recomputation(value: Any) -> Any:
    """Accept true, false, auto, selective or offload."""
    if not isinstance(value, bool) and value not in ("auto", "selective", "offload"):
        raise ValueError(f"got {shown_value(value)}, must be true, false, selective, offload or auto")
    return value


def _known_to_peft(block: dict[str, Any]) -> dict[str, Any]:
    """Check a `lora_config`; leave out nulls, which stand for PEFT's defaults."""
    if problems := lora_problems(block):
        raise ValueError("; ".join(problems))
    return {key: value for key, value in block.items() if value is not None}


def _known_to_transformers(block: dict[str, Any]) -> dict[str, Any]:
    """Check the keys of a `rope_scaling`, its type and its factor."""
    # transformers once used `type`; today it would read that as no scaling at all.
    block = {("rope_type" if key == "type" else key): value for key, value in block.items()}
    problems = [f"unknown key {key!r}{near_miss(key, _ROPE_KEYS)}" for key in block if key not in _ROPE_KEYS]
    kind = block.get("rope_type")
    if kind not in _ROPE_TYPES:
        problems.append(f"rope_type: got {shown_value(kind)}, must be one of {', '.join(_ROPE_TYPES)}")
    factor = block.get("factor")
    if kind != "longrope" and (
        not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < HIGHEST
    ):
        problems.append(f"factor: got {shown_value(factor)}, must be a number, 1 or more")
    if problems:
        raise ValueError("; ".join(problems))
    return block


def _rope_schema() -> dict[str, Any]:
    properties: dict[str, Any] = {key: {} for key in sorted(_ROPE_KEYS)}
    properties |= {key: {"enum": list(_ROPE_TYPES)} for key in ("rope_type", "type")}
    properties["factor"] = {"type": "number", "minimum": 1}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _fit_for_a_folder(name: str) -> str:
    if not (re.fullmatch(r"[^/\\.][^/\\]*", name) and name.isprintable()):
        raise ValueError(
            f"got {name!r}, must be a folder name: not empty, no slash, no line break, no dot at its start"
        )
    return name


Int = Annotated[int, BeforeValidator(_whole_number), Field(gt=-HIGHEST, lt=HIGHEST)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Positive = Annotated[Int, Field(gt=0)]
Examples = Annotated[Int, Field(gt=0, le=65_536)]  # of one batch, or batches of one step
Block = Annotated[dict[str, Any], BeforeValidator(_numbers_inside)]
LoraBlock = Annotated[Block, AfterValidator(_known_to_peft), WithJsonSchema(lora_schema())]
RopeBlock = Annotated[Block, AfterValidator(_known_to_transformers), WithJsonSchema(_rope_schema())]
Switch = Annotated[bool | dict[str, Any], BeforeValidator(_switch_or_block)]
_Written = Literal["exact_match", "tool_calls", "tool_accuracy"]
_WrittenBest = Literal["eval_loss", "exact_match", "tool_calls", "tool_accuracy"]
AnswerMetric = Annotated[
    Literal["exact_match", "tool_calls"], BeforeValidator(_metric, json_schema_input_type=_Written)
]
BestMetric = Annotated[
    Literal["eval_loss", "exact_match", "tool_calls"], BeforeValidator(_metric, json_schema_input_type=_WrittenBest)
]
Recomputation = Annotated[bool | Literal["auto", "selective", "offload"], BeforeValidator(_recomputation)]
Resources = dict[str, Annotated[int | float, BeforeValidator(_amount)]]
RunName = Annotated[str, AfterValidator(_fit_for_a_folder)]
