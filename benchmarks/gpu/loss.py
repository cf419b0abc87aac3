"""The loss over a large vocabulary, forward and backward: this project's, Liger Kernel's and the plain one.

    python benchmarks/gpu/loss.py                  8B's width and vocabulary, on a GPU with liger-kernel
    python benchmarks/gpu/loss.py --shape tiny     milliseconds on a CPU: that the script itself works

"ours" is fused_linear_cross_entropy with the chunk that the device and the vocabulary give, "ours, half" and
"ours, double" with another; "plain" has all logits at once. Hidden states need gradients, as under LoRA; with --full
the output layer does, too. The ways take turns; figures are medians. Peak memory is beside the inputs.

Prints one JSON object per way; exits with 1 if their losses differ by more than bfloat16's rounding. Where Liger Kernel
or a GPU is missing, its line says "not measured".
"""

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from forgebook.training import losses

SHAPES = {"8b": (8192, 4096, 128_256), "tiny": (1024, 32, 512)}  # positions, width, vocabulary


def ours(factor: float):
    """Return the loss of this project, in chunks of a factor of its own."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chunk = losses.loss_chunk
        losses.loss_chunk = lambda *given: max(1, int(chunk(*given) * factor))
        try:
            return losses.fused_linear_cross_entropy(hidden, weight, labels)
        finally:
            losses.loss_chunk = chunk

    return loss


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss with all logits at once."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of Liger Kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


def measure(way, inputs: tuple[torch.Tensor, ...], device: torch.device) -> tuple[float, float, float]:
    """Return one pass's milliseconds, gigabytes beside the inputs (0 on a CPU) and loss."""
    for tensor in inputs:
        tensor.grad = None
    is_gpu, before = device.type == "cuda", 0
    if is_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = way(*inputs)
    loss.backward()
    value = float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if is_gpu else 0
    return seconds * 1e3, peak / 1e9, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--full", action="store_true", help="the output layer needs gradients, too")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions, width, vocabulary = SHAPES[given.shape]
    torch.manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(positions, width, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, dtype=dtype, device=device) / width**0.5).requires_grad_(given.full)
    labels = torch.randint(vocabulary, (positions,), device=device)
    ways = {"ours": ours(1), "ours, half": ours(0.5), "ours, double": ours(2), "plain": plain}
    if device.type == "cuda" and find_spec("liger_kernel"):
        ways["liger"] = liger
    passes = {name: [] for name in ways}
    for turn in range(given.rounds + 1):
        for name, way in ways.items():
            one = measure(way, (hidden, weight, labels), device)
            if turn:  # the first one compiles and allocates
                passes[name].append(one)
    for name, ones in passes.items():
        milliseconds, gigabytes, loss = (statistics.median(column) for column in zip(*ones, strict=True))
        per_token = loss / positions
        print(json.dumps({"way": name, "ms": round(milliseconds, 2), "gb": round(gigabytes, 3), "loss": per_token}))
    if "liger" not in ways:
        print(json.dumps({"way": "liger", "note": "not measured: needs a GPU and liger-kernel"}))
    found = [statistics.median(loss for _, _, loss in ones) / positions for ones in passes.values()]
    if max(found) - min(found) > 0.02:
        sys.exit(f"the losses differ: {found}")


if __name__ == "__main__":
    main()
