"""Matrix products of bfloat16 on CPUs without instructions for it: computed in float32, rounded once.

On such a CPU (AVX2 alone: most laptops, and servers up to AMD's Zen 3) torch multiplies bfloat16 matrices 30 to 130
times slower than float32. oneDNN's own bfloat16 products sum in float32 and round once, and so do these: the same
run gives the same losses to within the order of summation.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

__all__ = ["is_needed", "use_float32_products"]

# What torch's linear layers, attention and losses call, forward and backward.
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mm.out", "addmm.out", "bmm.out", "baddbmm.out")


def is_needed() -> bool:
    """Check whether this CPU lacks fast products of bfloat16."""
    import torch

    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def use_float32_products() -> None:
    """Replace torch's CPU products of bfloat16 for the rest of the process; other types keep theirs."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in PRODUCTS:
            library.impl(
                name,
                _float32_product(torch.library.get_kernel(f"aten::{name}", "CPU"), name),
                "CPU",
                with_keyset=True,
                allow_override=True,
            )
    _installed.append(library)  # torch takes the kernels back when their library is collected


_installed: list[Any] = []


def _float32_product(kernel: Any, name: str) -> Any:
    """Wrap the kernel of a product so that bfloat16 goes through float32."""
    import torch

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 else value

    def product(keyset: Any, first: Any, *others: Any, **options: Any) -> Any:
        if first.dtype is not torch.bfloat16:
            return kernel.call_boxed(keyset, first, *others, **options)
        result = options.pop("out", first if name.endswith("_") else None)
        if name.endswith(".out"):
            wide = torch.empty_like(result, dtype=torch.float32)
            return result.copy_(kernel.call_boxed(keyset, widen(first), *map(widen, others), out=wide, **options))
        wide = kernel.call_boxed(keyset, widen(first), *map(widen, others), **options)
        return wide.bfloat16() if result is None else result.copy_(wide)

    return product
