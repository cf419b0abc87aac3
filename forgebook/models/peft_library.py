"""PEFT, from where the engine takes all of it: without bitsandbytes in a process that has no quantized weights.

PEFT imports bitsandbytes wherever it is installed, when it is imported and when it adapts a layer. transformers imports
it for quantized weights when it loads them, which is before they get an adapter.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from forgebook.models.unused_packages import without_unused

__all__ = [
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


@contextlib.contextmanager
def without_unused_bitsandbytes() -> Iterator[None]:
    """Let PEFT find no bitsandbytes in a block, unless this process has imported it."""
    _forget_answers()
    try:
        with without_unused("bitsandbytes"):
            yield
    finally:
        _forget_answers()


def _forget_answers() -> None:
    """Let PEFT look for bitsandbytes again; it keeps what it found the first time."""
    checks: Any = sys.modules.get("peft.import_utils")
    if checks is not None:
        checks.is_bnb_available.cache_clear()
        checks.is_bnb_4bit_available.cache_clear()


with without_unused_bitsandbytes():
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import transformers_weight_conversion
