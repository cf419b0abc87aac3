"""PEFT, from where the engine takes all of it: without bitsandbytes in a process that has no quantized weights.

PEFT imports bitsandbytes wherever it is installed, when it is imported and when it adapts a layer. transformers imports
it for quantized weights when it loads them, which is before they get an adapter.
"""

from __future__ import annotations

import contextlib

from forgebook.models.unused_packages import without_unused

__all__ = [
    "KNOWN_TARGETS",
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "ParamWrapper",
    "PeftConfig",
    "PeftModel",
    "get_peft_model",
    "transformers_weight_conversion",
    "without_unused_bitsandbytes",
]

with without_unused("bitsandbytes"):
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import transformers_weight_conversion
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
is_bnb_available.cache_clear()  # its answer is that of the block
is_bnb_4bit_available.cache_clear()


def without_unused_bitsandbytes() -> contextlib.AbstractContextManager[None]:
    """Let PEFT find no bitsandbytes in a block, unless this process has imported it."""
    return without_unused("bitsandbytes", is_bnb_available, is_bnb_4bit_available)
