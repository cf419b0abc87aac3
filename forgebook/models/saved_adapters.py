"""Adapters that were trained before: loaded for use, and checked before they are trained further.

model = attach_adapter(model, adapter_folder)      for use
model = continue_lora(model, adapter_folder, ...)  to be trained further, with the settings that it has
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError
from forgebook.models.adapters import add_lora, in_dtype_of_base, read_overrides
from forgebook.models.families import freeze_towers, tower_modules
from forgebook.models.tokenizer import readable_model_errors, refuse_pickled
from forgebook.runs.atomic import read_json
from forgebook.runs.checksums import check_files
from forgebook.runs.run import display_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach_adapter", "check_adapter", "check_reach", "continue_lora"]

# The settings that select an adapter's layers: different names may mean the same.
REACH = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save",
)  # fmt: skip


def check_adapter(source: str, lora_config: dict[str, Any], rope_scaling: dict[str, Any] | None = None) -> None:
    """Raise ModelError unless a saved adapter matches the rope_scaling and lora_config of the config."""
    earlier, named = read_overrides(source).get("rope_scaling"), display_path(Path(source))
    if earlier != rope_scaling:
        raise ModelError(
            f"the adapter {named} was trained with rope_scaling: {earlier or 'null'}, the config says "
            f"{rope_scaling or 'null'}: set it to the same"
        )
    with readable_model_errors(source, "adapter"):
        if Path(source).is_dir():  # PEFT is slow to import, and not quiet
            saved = read_json(Path(source) / "adapter_config.json")
        else:
            from forgebook.models.peft_library import PeftConfig

            saved = PeftConfig.from_pretrained(source).to_dict()
    differing = [
        f"{key}: {saved.get(key)}, lora_config says {value}"
        for key, value in lora_config.items()
        if key not in REACH and not _is_same(value, saved.get(key))
    ]
    if differing:
        keys, them = ("keys", "them") if len(differing) > 1 else ("key", "it")
        raise ModelError(
            f"the adapter {named} has {'; '.join(differing)}: a continued adapter keeps its settings; leave the {keys} "
            f"out or set {them} to the same"
        )


def _is_same(value: Any, saved: Any) -> bool:
    """Compare a setting of lora_config with what an adapter has; PEFT adds patterns of its own for experts."""
    if isinstance(value, dict) and isinstance(saved, dict):
        return all(saved.get(key) == one for key, one in value.items())
    return (value or None) == (saved or None)


def check_reach(make_skeleton: Callable[[], PreTrainedModel], source: str, lora_config: dict[str, Any]) -> None:
    """Raise ModelError if a saved adapter is of other layers than a config's lora_config names.

    make_skeleton: makes the base model without weights.
    """
    from forgebook.models.peft_library import PeftConfig, get_peft_model, without_unused_bitsandbytes

    keys = [key for key in REACH if lora_config.get(key)]
    if not keys:
        return
    with warnings.catch_warnings(), readable_model_errors(source, "adapter"):
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(source)
        config.inference_mode, config.init_lora_weights = False, False
        with without_unused_bitsandbytes():
            saved = _layers_of(get_peft_model(make_skeleton(), config))
        named = _layers_of(add_lora(make_skeleton(), lora_config | {"init_lora_weights": False}))
    if saved == named:
        return
    texts = [
        f"{min(layers)} is in {place} alone"
        for layers, place in ((saved - named, "the adapter"), (named - saved, "lora_config"))
        if layers
    ]
    raise ModelError(
        f"the adapter {display_path(Path(source))} is of other layers than lora_config says: {', '.join(texts)}. A "
        f"continued adapter keeps its settings: leave {', '.join(keys)} out or set it to the same"
    )


def _layers_of(model: Any) -> set[str]:
    """Name the layers of a model with adapters that train, except in towers, which no text reaches."""
    causal = model.get_base_model()
    towers = tuple(f"{name}." for name in tower_modules(causal))
    layers = (re.sub(r"(\.base_layer)*\.(lora_|modules_to_save).*", "", name) for name, _ in causal.named_parameters()
              if re.search(r"\.(lora_|modules_to_save)", name))  # fmt: skip
    return {layer for layer in layers if not layer.startswith(towers)}


def attach_adapter(model: Any, source: str, name: str = "default", **settings: Any) -> Any:
    """Load a saved adapter onto a model, which may have others already; return the model.

    settings: of PEFT's from_pretrained. Raises ModelError if it cannot be read, or has no weights for layers that it is
    of: it was trained on a model whose layers have other names.
    """
    from forgebook.models.checkpointing import drop_input_gradients
    from forgebook.models.expert_adapters import quiet_about_experts, use_low_rank_products
    from forgebook.models.fused_lora import use_fused_products
    from forgebook.models.peft_library import PeftModel, without_unused_bitsandbytes

    with readable_model_errors(source, "adapter"), quiet_about_experts(), without_unused_bitsandbytes():
        warnings.filterwarnings("error", "Found missing adapter keys")
        # PEFT asks for a property that transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            if not hasattr(model, "peft_config"):
                base, model = model, PeftModel.from_pretrained(model, source, adapter_name=name, **settings)
                drop_input_gradients(base)
                use_low_rank_products(model)
                use_fused_products(model)
                return model
            missing = model.load_adapter(source, adapter_name=name, **settings).missing_keys
        except UserWarning as warning:
            missing = re.findall(r"'([^']+)'", str(warning))
    if missing:
        first = missing[0].removeprefix("base_model.model.")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the adapter {display_path(Path(source))} has no weights for {first}{more}, which would stay as in the "
            "base: it was trained on a model whose layers have other names"
        )
    return model


def continue_lora(
    model: PreTrainedModel,
    source: str,
    lora_config: dict[str, Any],
    rope_scaling: dict[str, Any] | None = None,
):
    """Put a trained LoRA adapter on a model, to be trained further.

    lora_config: of the config, which the adapter must match; rope_scaling: that of `model`.

    Raises ModelError if the adapter does not match them.
    """
    check_adapter(source, lora_config, rope_scaling)
    refuse_pickled(source)
    check_files(source)
    model = attach_adapter(model, source, is_trainable=True, autocast_adapter_dtype=False)
    freeze_towers(model)  # an adapter of another program may reach them
    return in_dtype_of_base(model)
