"""What a model's own config.json says of it, without loading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError
from forgebook.models.tokenizer import readable_model_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["context_limit", "native_context_length"]


def native_context_length(source: str) -> int:
    """Read the longest context, in tokens, that a model was trained for. Raises ModelError if it has no such limit."""
    from transformers import AutoConfig

    with readable_model_errors(source, "model"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    native = getattr(config.get_text_config(), "max_position_embeddings", None)
    if native is None:  # Mamba has no such limit
        raise ModelError(f"the config of {source} has no max_position_embeddings: set context_length")
    return native


def context_limit(source: str, rope_scaling: dict[str, Any] | None = None) -> int | None:
    """Compute the longest context that the model's positions reach, extended by `rope_scaling`; None: no limit."""
    from transformers import AutoConfig

    with readable_model_errors(source, "model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    native = getattr(config, "max_position_embeddings", None)
    if native is None:
        return None
    # Without a rope_scaling of this run: the base may be a checkpoint whose context was extended.
    scaling = rope_scaling or getattr(config, "rope_parameters", None) or {}
    original = scaling.get("original_max_position_embeddings") or native
    return max(native, int(original * (scaling.get("factor") or 1)))
