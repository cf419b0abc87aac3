"""Settings of a config without effect, from the shape of its model alone, as the run would report them. No torch.

warnings = check_written(config, shape, planned.steps)     ConfigError or ModelError where nothing would be trained
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forgebook.config.unread_keys import unread_keys
from forgebook.errors import ModelError
from forgebook.models.lora_targets import layers_of_shape, unmatched_targets
from forgebook.planning import schedule
from forgebook.planning.trainable import adapted_layers, trainable_parameters

if TYPE_CHECKING:
    from forgebook.catalog import Shape
    from forgebook.config.schema import FinetuneConfig

__all__ = ["check_written"]


def check_written(config: FinetuneConfig, shape: Shape, steps: int | None) -> list[str]:
    """List warnings about keys that nothing reads, layers that do not exist and a warm-up that does not end.

    steps: optimizer steps of the run, None if the data is not counted.

    Raises ModelError if no layer gets an adapter, ConfigError if a single step would have a learning rate of 0.
    """
    warnings = unread_keys(config)
    lora = config.lora_config
    if lora is not None and config.initial_adapter_model_ckpt_path is None:
        unmatched = unmatched_targets(lora, layers_of_shape(shape))
        if unmatched and not lora.get("target_parameters") and not trainable_parameters(lora, shape):
            raise ModelError("; ".join(unmatched))
        if lora.get("exclude_modules") and not lora.get("target_parameters") and not adapted_layers(lora, shape):
            raise ModelError("lora_config.exclude_modules leaves out every layer that target_modules names")
        warnings += unmatched
    # A default warm-up is at most a tenth of a short run.
    if steps is not None and "num_warmup_steps" in config.explicit_keys:
        warnings += filter(None, [schedule.check_warmup(config.num_warmup_steps, steps)])
    return warnings
