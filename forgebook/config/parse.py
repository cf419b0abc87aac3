"""Read a config file, with overrides, into a `FinetuneConfig`; write it back with the origin of every value.

    load_config("tiny.yaml")                                        a file
    load_config("https://host/tiny.yaml", ["num_epochs=1"])         a URL and an override
    load_config("tiny.yaml", ["lora_config.r=16", "deepspeed=none"])

The keys are defined in `schema`; `legacy_keys` translates the names of older files; `yaml_source` reads the text.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from forgebook.catalog import hardware_of
from forgebook.config.block_keys import flatten, models_in, prefixes
from forgebook.config.blocks import TEMPLATE_SETTINGS, DeepSpeed
from forgebook.config.deepspeed_file import REPOSITORY, SHIPPED, find_deepspeed_config
from forgebook.config.legacy_keys import RetiredNameWarning, translate_retired
from forgebook.config.other_names import suggest_key
from forgebook.config.paths import expand_values
from forgebook.config.rules import broken_rules, open_keys
from forgebook.config.schema import (
    DEFAULT_LORA,
    EVERY_EPOCH,
    FinetuneConfig,
    ResolvedConfig,
    keys_without_effect,
)
from forgebook.config.yaml_source import Locations, apply_override, location_of, parse_yaml, read_text
from forgebook.errors import ConfigError, near_miss, shown_value

__all__ = ["CONFIG_HEADER", "SECRET_KEY", "config_differences", "dump_config", "load_config", "load_resolved"]

CONFIG_HEADER = (
    "# As resolved; each line ends with where its value came from: file, override, default or auto (and why)."
)
SECRET_KEY = re.compile(r"token|secret|api_?key|password", re.IGNORECASE)


def load_config(path_or_url: str | Path, overrides: Sequence[str] = (), default: bool = False) -> FinetuneConfig:
    """Read and check a config; one ConfigError names everything that is wrong with it.

    Args:
        overrides: `key=value` with a dotted key and a YAML value; a later one wins.
        default: train a small LoRA adapter unless the config says otherwise; planning.auto_config chooses the rest.
    """
    source = str(path_or_url)
    values, locations = parse_yaml(read_text(source), source)
    if not isinstance(values, dict):
        content = "is empty" if values is None else f"holds {shown_value(values)}"
        raise ConfigError(f"{source} {content}, must hold 'key: value' lines, at least model_id and train_path")
    # Blocks that the file's anchors are written in, as in Docker Compose.
    values = {key: value for key, value in values.items() if not str(key).startswith("x-")}
    notes, problems = translate_retired(values)
    for override in overrides:
        more_notes, more_problems = apply_override(override, values, locations)
        notes += more_notes
        problems += more_problems
    for note in notes:
        warnings.warn(note, RetiredNameWarning, stacklevel=2)
    problems += _move_template_settings(values, locations)
    values, unexpanded = expand_values(values, lambda key: _where([key], locations, source))
    problems += unexpanded
    _divide_devices(values, locations)
    written = flatten(values)

    if default:
        values.setdefault("lora_config", dict(DEFAULT_LORA))
    if values.get("run_name") is None:
        values["run_name"] = PurePosixPath(source.partition("?")[0]).stem
    config = None
    try:
        config = FinetuneConfig.model_validate(values)
    except ValidationError as error:
        problems += _explain(error, values, locations, source)
    if problems or config is None:
        raise ConfigError("\n".join(problems))

    # A null that was filled in, such as an empty `learning_rate:`, was not chosen by the file.
    origins = {
        key: "override" if isinstance(location_of(key, locations), str) else "file"
        for key, value in written.items()
        if value is not None or getattr(config, key, None) is None
    }
    if "sharding" in origins and not any(key.split(".")[0] == "deepspeed" for key in origins):
        origins["deepspeed"] = origins["sharding"]  # it is filled in
    config = _findable_anywhere(config.with_origins(origins, source))
    config._is_default = default
    if config.hardware is not None:
        hardware_of(config.hardware)  # reject an unknown GPU now, not when the run is planned
    broken = broken_rules(config, open_keys(config) if default else ())
    if broken:
        raise ConfigError("\n".join(f"{rule} ({_where(rule.keys, locations, source)})" for rule in broken))
    if not all(logger.rank_zero_only for logger in config.loggers):
        note = "metrics cover all workers and are sent once, by the process that started the run"
        warnings.warn(f"logger.rank_zero_only: false has no effect: {note}", stacklevel=2)
    return config


def load_resolved(path: str | Path) -> ResolvedConfig:
    """Read the config of a run's folder; raise ConfigError if it lacks what every run's has."""
    try:
        return load_config(path).resolved()
    except ValidationError as error:
        missing = ", ".join(sorted({str(item["loc"][0]) for item in error.errors(include_url=False)}))
        raise ConfigError(f"{path} has no value of {missing}: it is damaged, or not the config of a run") from None


def _divide_devices(values: dict[str, Any], locations: Locations) -> None:
    """Read `num_devices: {min: 1, max: 2}` as two keys, in place."""
    devices = values.get("num_devices")
    if isinstance(devices, dict) and set(devices) == {"min", "max"}:
        values |= {"num_devices": devices["max"], "min_devices": devices["min"]}
        if (location := location_of("num_devices", locations)) is not None:
            locations["min_devices"] = location


def _move_template_settings(values: dict[str, Any], locations: Locations) -> list[str]:
    """Read `chat_template_kwargs` of the top level, as other tools have it, as part of `generation_config`, in place.

    Returns the contradiction where both are set.
    """
    block = values.get("generation_config") or {}
    if TEMPLATE_SETTINGS not in values or not isinstance(block, dict):  # the schema explains what is wrong with it
        return []
    settings = values.pop(TEMPLATE_SETTINGS)
    if settings is None:
        return []
    if block.get(TEMPLATE_SETTINGS):
        return [f"{TEMPLATE_SETTINGS} and generation_config.{TEMPLATE_SETTINGS} are both set: keep one"]
    values["generation_config"] = block | {TEMPLATE_SETTINGS: settings}
    for key in [key for key in locations if key.split(".")[0] == TEMPLATE_SETTINGS]:
        locations[f"generation_config.{key}"] = locations[key]
    return []


def dump_config(config: FinetuneConfig) -> str:
    """Write every value as YAML, its origin in a comment; `load_config` reads it back, secrets excepted."""
    values = config.model_dump(mode="json")
    loggers = values["logger"] or []
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        logger["provider_config"] = _without_secrets(logger["provider_config"])
    return "\n".join([CONFIG_HEADER, *_dump_block(values, config.origins)]) + "\n"


def config_differences(a: FinetuneConfig, b: FinetuneConfig) -> list[str]:
    """List the dotted keys whose values differ, except those without effect on the trained weights."""
    left, right = (_comparable(config) for config in (a, b))
    return [
        key
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and keys_without_effect().isdisjoint(prefixes(key))
    ]


def _comparable(config: FinetuneConfig) -> dict[str, Any]:
    """List every value by its dotted key; a frequency left open is that of a resolved config."""
    every = config.checkpoint_and_evaluation_frequency or EVERY_EPOCH
    return flatten(config.model_dump() | {"checkpoint_and_evaluation_frequency": every.model_dump()})


def _findable_anywhere(config: FinetuneConfig) -> FinetuneConfig:
    """Store the full path of a file next to the config: the copy of the config in the run folder must find it, too."""
    if config.deepspeed is None:
        return config
    written = config.deepspeed.config_path
    path = find_deepspeed_config(written, config.source)
    if path in ((folder / written).resolve() for folder in (Path(), REPOSITORY)):
        return config
    stored = f"{SHIPPED.name}/{path.name}" if path.parent == SHIPPED else str(path)
    return config.model_copy(update={"deepspeed": DeepSpeed(config_path=stored)})


# -- error messages

_NEEDS = {
    "bool_type": "true or false",
    "dict_type": "a block of 'key: value' lines",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "missing": "longer",
    "model_type": "a block of 'key: value' lines",
    "string_type": "text (quote a number)",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def _explain(error: ValidationError, values: dict[str, Any], locations: Locations, source: str) -> list[str]:
    """Turn pydantic's errors into one line per key, in the terms of the config and with its location in the file."""
    problems: dict[tuple[str, str], list[str]] = {}  # several needs where each member of a union has its own
    for item in error.errors(include_url=False):
        location, kind = item["loc"], item["type"]
        key, value = _as_written(location, values)
        need = ""
        if kind == "missing" and isinstance(location[-1], str):
            problem = f"missing key {'.'.join(map(str, [key, location[-1]])).removeprefix('.')!r}"
        elif kind in ("extra_forbidden", "invalid_key"):
            known = [name for name in _known_keys(location) if name != location[-1]]  # of another block of the union
            suggest = suggest_key if len(location) == 1 else near_miss
            problem = f"unknown key {key!r}{suggest(location[-1], known)}"
        elif kind == "value_error":
            problem = f"{key}: {item['ctx']['error']}".removeprefix(": ")
        else:
            problem = f"{key}: got {shown_value(value)}, must be "
            need = _NEEDS.get(kind, "").format_map(item.get("ctx", {}))
            need = need or item["msg"].removeprefix("Input should be ")
        problems.setdefault((key, problem), []).append(need)
    lines = []
    for (key, problem), needs in problems.items():
        lines.append(f"{problem}{' or '.join(dict.fromkeys(needs))} ({_where([key], locations, source)})")
    return lines


def _where(keys: Sequence[str], locations: Locations, source: str) -> str:
    """Return where the first of these keys was set: `file:line`, or the override."""
    location = next((location for key in keys if (location := location_of(key, locations)) is not None), None)
    return f"{source}:{location}" if isinstance(location, int) else location or source


def _as_written(location: tuple[int | str, ...], value: Any) -> tuple[str, Any]:
    """Turn a pydantic location into the key and value in the file, without the names of union members."""
    parts = []
    for part in location:
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in inside:
            parts.append(str(part))
            value = value[part]
    return ".".join(parts), value


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """List the keys of the block that a pydantic location leads into."""
    model: type[BaseModel] = FinetuneConfig
    for part in location[:-1]:
        if part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


# -- writing YAML


def _dump_block(block: dict[str, Any], origins: dict[str, str], prefix: str = "", indent: str = "") -> Iterator[str]:
    for key, value in block.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield f"{indent}{_inline(key)}:"
            yield from _dump_block(value, origins, f"{dotted}.", f"{indent}  ")
        else:
            yield f"{indent}{_inline(key)}: {_inline(value)}  # {origins[dotted]}"


def _inline(value: Any) -> str:
    """Write a value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value) if "\n" in text else text


def _without_secrets(block: dict[str, Any], secret: bool = False) -> dict[str, Any]:
    """Hide values whose key sounds like a secret: run folders are shared."""
    hidden = {}
    for key, value in block.items():
        hide = secret or SECRET_KEY.search(str(key)) is not None
        hidden[key] = _without_secrets(value, hide) if isinstance(value, dict) else "***" if hide else value
    return hidden
