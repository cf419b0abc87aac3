"""The keys of a config as a JSON schema, by which an editor completes and checks a YAML while it is written.

    python main.py schema > config.schema.json

It is made of the classes in `schema` and `blocks` with their docstrings. It accepts every form that `parse` accepts,
and leaves to `parse` what concerns several keys at once (`rules`), paths, and names that a catalog knows.
"""

import re
from typing import Any

from forgebook.config.blocks import TEMPLATE_SETTINGS
from forgebook.config.legacy_keys import retired_keys
from forgebook.config.schema import FinetuneConfig

__all__ = ["config_schema"]

# pydantic leaves these as they are where a validator stands before the bound.
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_VARIABLE = r"\$\{"  # an environment variable may stand for any value
_NUMBER = rf"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|{_VARIABLE}"  # YAML 1.1 reads 1e-4 as text
_FREE_TEXT = frozenset(("default", "enum", "examples"))  # values of a config, not schemas


def config_schema() -> dict[str, Any]:
    """Describe every key of a config as a JSON schema (draft 2020-12)."""
    schema = _as_written(FinetuneConfig.model_json_schema())
    properties = schema["properties"]
    retired = {key: {"deprecated": True, "description": f"Retired: {note}."} for key, note in retired_keys().items()}
    # The short forms that are read before the classes see them.
    properties["deepspeed"]["anyOf"].append({"type": "string"})
    properties[TEMPLATE_SETTINGS] = schema["$defs"]["GenerationConfig"]["properties"][TEMPLATE_SETTINGS]
    for block in properties["lora_config"]["anyOf"]:
        if "properties" in block:
            block["properties"]["rank"] = {"deprecated": True, "description": "Retired: read as r."}
    devices = properties["num_devices"]
    description, default = devices.pop("description"), devices.pop("default")
    limits = {"type": "object", "required": ["min", "max"], "additionalProperties": False}
    both = limits | {"properties": {"min": dict(devices), "max": dict(devices)}}
    properties["num_devices"] = {"anyOf": [devices, both], "description": description, "default": default}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Forgebook config",
        "properties": properties | retired,
        "patternProperties": {"^x-": {"description": "A block that the file's anchors are written in."}},
    }


def _as_written(node: Any, names: bool = False) -> Any:
    """Correct a schema of the loaded values so that it describes them as they are written.

    names: the keys of this node are names of a config's, such as those of `properties`.
    """
    if isinstance(node, list):
        return [_as_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _as_written(value) for key, value in node.items()}
    schema = {
        _BOUNDS.get(key, key): value if key in _FREE_TEXT else _as_written(value, key in ("properties", "$defs"))
        for key, value in node.items()
        if key != "title"
    }
    if "description" in schema:
        schema["description"] = re.sub(r"\s+", " ", schema["description"])
    if "patternProperties" in schema:
        schema["additionalProperties"] = False
    kind = schema.get("type")
    if kind in ("integer", "number"):
        schema |= {"type": [kind, "string"], "pattern": _NUMBER}
    elif kind == "boolean":
        schema |= {"type": [kind, "string"], "pattern": _VARIABLE}
    elif "enum" in schema:
        either = [{"enum": schema.pop("enum")}, {"type": "string", "pattern": _VARIABLE}]
        schema.pop("type", None)
        schema["anyOf"] = either
    return schema
