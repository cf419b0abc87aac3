"""The values that the program chose for a config, each with its reason, as `config.explained` keeps them.

config = take(config, "num_epochs", 3, "3,000 rows")     unless the file or an override gives it
print(choice_rows(choices_of(config)))                   [["num_epochs", "3", "3,000 rows"], ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.config.schema import auto_keys

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = ["KEYS", "Choice", "choice_rows", "choices_of", "is_open", "take"]

KEYS = auto_keys()
# A null of these was chosen by who wrote it.
_NULL_IS_AN_ANSWER = ("lora_config", "quantization", "deepspeed")


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
