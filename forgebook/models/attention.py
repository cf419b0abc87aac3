"""Which attention kernel a model runs with: chosen from facts about its device, or refused with the fix.

facts  = attention_facts("bfloat16")                  of this process; `on_gpu=False` for a model that stays on the CPU
kernel = choose_attention("auto", facts)              the first of FASTEST that runs, else "eager"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgebook.errors import ResourceError
from forgebook.models.varlen_attention import VARLEN, why_not_varlen

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "SEGMENTED",
    "AttentionFacts",
    "attention_facts",
    "attention_obstacles",
    "choose_attention",
    "lacking_kernels",
    "padding_note",
]

# Flash attention: the package that holds it, and the oldest compute capability that it is compiled for.
FLASH = {"flash_attention_2": ("flash-attn", (8, 0)), "flash_attention_3": ("flash-attn-3", (9, 0))}
OLDEST_VARLEN = (8, 0)  # compute capability of torch's own flash kernels
HALF = ("bfloat16", "float16")
# What `auto` takes the first of that runs. Packages come first: whoever installed one wants it.
FASTEST = ("flash_attention_3", "flash_attention_2", VARLEN, "sdpa")
# Kernels that keep examples of one line apart by their lengths.
SEGMENTED = (*FLASH, VARLEN)
# What configs call a kernel -> what transformers calls it, where the two differ.
NAMES = {"flex": "flex_attention"}


@dataclass(frozen=True)
class AttentionFacts:
    """What decides which kernels run. dtype: of the weights.

    capability: compute capability of the GPU that holds the model, such as (8, 0); None on a CPU.
    installed: which of `FLASH` can be imported. lacking: kernels that the architecture has no code for.
    not_varlen: why torch's variable-length kernel cannot compute this model's attention; None if it can.
    """

    dtype: str
    capability: tuple[int, int] | None
    installed: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()
    not_varlen: str | None = None


def attention_facts(
    dtype: str,
    on_gpu: bool | None = None,
    model_class: type | None = None,
    model_config: PretrainedConfig | None = None,
) -> AttentionFacts:
    """Collect the facts of this process. on_gpu: whether the model is held by its GPU; None: if there is one.

    model_class: the class of transformers that it is loaded as; None: one with every kernel. model_config: its config;
    None: one of a model that torch's variable-length kernel can compute.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    has_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu and torch.cuda.is_available()
    available = {
        "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(),
    }
    capability = torch.cuda.get_device_capability() if has_gpu else None
    installed = frozenset(name for name, is_there in available.items() if is_there)
    not_varlen = why_not_varlen(model_config, model_class) if model_config is not None else None
    return AttentionFacts(dtype, capability, installed, lacking_kernels(model_class), not_varlen)


def lacking_kernels(model_class: type | None) -> frozenset[str]:
    """List the kernels that an architecture has no code for: gpt-oss has no SDPA, and a flash attention of its own."""
    if model_class is None:
        return frozenset()
    flash = getattr(model_class, "_compatible_flash_implementations", None)
    has_flash = getattr(model_class, "_supports_flash_attn", False)
    supported = {name: has_flash and (flash is None or name in flash) for name in FLASH}
    supported |= {kind: getattr(model_class, f"_supports_{kind}", False) for kind in ("sdpa", "flex_attn")}
    return frozenset({"flex_attn": "flex"}.get(name, name) for name, is_there in supported.items() if not is_there)


def choose_attention(kind: str, facts: AttentionFacts, is_required: bool = True) -> str:
    """Name the kernel for transformers; `auto` is the first of FASTEST that runs, else eager.

    is_required: False takes `auto` where the kernel does not run, as for a model that is used on another machine.

    Raises ResourceError if the kernel is named in the config and cannot run: it needs a GPU of compute capability 8.0
    (flash_attention_2, varlen) or 9.0 (flash_attention_3), bfloat16 or float16, and its package if it has one.
    """
    obstacle = _obstacle(kind, facts)
    if kind == "auto" or (obstacle is not None and not is_required):
        # On a CPU, the plain attention of all examples at once is faster than one after the other.
        kinds = [one for one in FASTEST if facts.capability is not None or one != VARLEN]
        return next((one for one in kinds if _obstacle(one, facts) is None), "eager")
    if obstacle is not None:
        raise ResourceError(f"attention: {kind} {obstacle}; set attention: auto for the fastest that runs here")
    return NAMES.get(kind, kind)


def attention_obstacles(facts: AttentionFacts) -> dict[str, str | None]:
    """Map each kernel to what keeps it from running; None if nothing does."""
    return {kind: _obstacle(kind, facts) for kind in (*FLASH, VARLEN, "sdpa", "flex", "eager")}


def padding_note(kind: str, facts: AttentionFacts) -> str | None:
    """Return why `auto` computes padding along on this GPU, which is slower; None if it does not."""
    if kind != "auto" or facts.capability is None:
        return None
    kernel = choose_attention(kind, facts)
    return None if kernel in SEGMENTED else f"attention: {kernel}, with padding: {VARLEN} {_obstacle(VARLEN, facts)}"


def _obstacle(kind: str, facts: AttentionFacts) -> str | None:
    """Return what keeps a kernel from running; None if nothing does."""
    if kind in facts.lacking:
        return "is not implemented for this architecture"
    if kind == VARLEN and facts.not_varlen is not None:
        return f"cannot compute this model: {facts.not_varlen}"
    if kind not in FLASH and (kind != VARLEN or facts.capability is None):
        return None
    package, oldest = FLASH.get(kind, (None, OLDEST_VARLEN))
    if facts.capability is None:
        return "needs a GPU"
    if facts.capability < oldest:
        needed, present = ("{}.{}".format(*pair) for pair in (oldest, facts.capability))
        return f"needs a GPU of compute capability {needed} or newer, this one has {present}"
    if facts.dtype not in HALF:
        return f"computes in bfloat16 or float16, dtype is {facts.dtype}"
    if package is not None and kind not in facts.installed:
        return f"needs the package {package} (requirements-gpu.txt)"
    return None
