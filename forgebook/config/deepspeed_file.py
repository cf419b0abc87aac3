"""The DeepSpeed file that a config names: where it is, what it holds, and how it shards a model."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from forgebook.config.blocks import DeepSpeed
from forgebook.config.legacy_keys import current_deepspeed_file
from forgebook.errors import ConfigError, shown_value

__all__ = ["REPOSITORY", "SHIPPED", "Zero", "find_deepspeed_config", "read_deepspeed_config", "zero_of"]

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "deepspeed_configs"


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed shards a model. stage 0: not at all; offload_*: what it moves to the host's memory."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False


def zero_of(settings: dict[str, Any] | None) -> Zero:
    """Read the ZeRO stage and the offloads out of DeepSpeed settings; None: plain data parallelism."""
    block = (settings or {}).get("zero_optimization") or {}
    stage = block.get("stage", 0)
    optimizer, parameters = (
        (block.get(name) or {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")
    )
    return Zero(stage, optimizer, parameters and stage == 3)


def find_deepspeed_config(config_path: str, config_source: str | None = None) -> Path:
    """Search for a DeepSpeed file in the working directory, next to the config file, then in this repository."""
    beside = [Path(config_source).parent] if config_source is not None and "://" not in config_source else []
    folders = [Path(), *beside, REPOSITORY]
    for folder in folders:
        path = (folder / config_path).resolve()
        if path.is_file():
            return path
    # Configs of other projects name a folder of their own, such as configs/deepspeed/zero_3.json.
    shipped = sorted(path.name for path in SHIPPED.glob("*.json"))
    name = current_deepspeed_file(PurePosixPath(config_path).name)
    if name in shipped:
        warnings.warn(f"{config_path} does not exist: using {SHIPPED.name}/{name}", stacklevel=2)
        return SHIPPED / name
    searched = " nor in ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    raise ConfigError(
        f"deepspeed.config_path: got {config_path!r}, which is not in {searched}; must be a file of yours or "
        f"one of {SHIPPED.name}/: {', '.join(shipped)}"
    )


def read_deepspeed_config(block: DeepSpeed | None, config_source: str | None = None) -> dict[str, Any] | None:
    """Read the DeepSpeed file that a config names; None means plain data parallelism.

    config_source: path of the config file, whose folder is searched, too.
    """
    if block is None:
        return None
    path = find_deepspeed_config(block.config_path, config_source)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config_path: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"deepspeed.config_path: {path} is not text, must be a JSON file") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds {shown_value(settings)}, must hold one JSON object of DeepSpeed settings")
    return settings
