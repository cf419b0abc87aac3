"""How many positions of the loss are computed at once, by device and vocabulary: training and the plan read it here.

positions = loss_chunk(on_gpu, vocabulary * 6)
"""

from __future__ import annotations

import math

__all__ = ["FEWEST_POSITIONS", "loss_chunk"]

# On a CPU larger chunks make no step faster, as the matrix products are large already (benchmarks/step); they only take
# more memory. A GPU multiplies in tiles of 128 x 128, of which it needs several hundred at once: the gradient of 256
# positions of 4,096 numbers has 64. So there it is as many as LOSS_BYTES hold; by arithmetic, not measured.
FEWEST_POSITIONS, MOST_POSITIONS = 256, 4096
LOSS_BYTES = 2**30


def loss_chunk(on_gpu: bool, bytes_each: int) -> int:
    """Choose how many positions of the loss are computed at once; bytes_each: what the logits of one take."""
    if not on_gpu:
        return FEWEST_POSITIONS
    fitting = 2 ** int(math.log2(LOSS_BYTES / bytes_each)) if bytes_each < LOSS_BYTES else 1
    return min(MOST_POSITIONS, max(FEWEST_POSITIONS, fitting))
