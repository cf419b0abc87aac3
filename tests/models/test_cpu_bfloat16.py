"""Products of bfloat16 through float32: rounded once, in place and out of place, forward and backward."""

import subprocess
import sys

from conftest import REPOSITORY, TINY_MODEL
from forgebook.models.cpu_bfloat16 import is_needed

CODE = """
import torch
from forgebook.models.cpu_bfloat16 import use_float32_products

torch.manual_seed(0)
a, b, c = torch.randn(2, 5, 7), torch.randn(2, 7, 3), torch.randn(2, 5, 3)
exact = [a[0] @ b[0], torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2.0)]
use_float32_products()
use_float32_products()
assert torch.equal(exact[0], a[0] @ b[0]) and torch.equal(exact[1], torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2.0))

x, y, z = a.bfloat16(), b.bfloat16(), c.bfloat16()
def rounded(value): return value.bfloat16()
X, Y, Z = x.float(), y.float(), z.float()
assert torch.equal(x[0] @ y[0], rounded(X[0] @ Y[0]))
assert torch.equal(x @ y, rounded(X @ Y))
assert torch.equal(torch.baddbmm(z, x, y, alpha=3.0), rounded(torch.baddbmm(Z, X, Y, alpha=3.0)))
assert torch.equal(torch.addmm(z[0], x[0], y[0], beta=0.5), rounded(torch.addmm(Z[0], X[0], Y[0], beta=0.5)))
out = torch.empty_like(z[0])
assert torch.mm(x[0], y[0], out=out) is out and torch.equal(out, rounded(X[0] @ Y[0]))
kept = z[0].clone()
assert kept.addmm_(x[0], y[0]) is kept and torch.equal(kept, rounded(torch.addmm(Z[0], X[0], Y[0])))
view = torch.zeros(4, 5, 3, dtype=torch.bfloat16)
torch.mm(x[0], y[0], out=view[2])
assert torch.equal(view[2], rounded(X[0] @ Y[0])) and not view[[0, 1, 3]].any()

w = torch.randn(4, 7).bfloat16().requires_grad_()
inputs = x.clone().requires_grad_()
torch.nn.functional.linear(inputs, w).sum().backward()
ones = torch.ones(10, 4)
assert torch.equal(w.grad, rounded(ones.T @ X.reshape(10, 7)))
assert torch.equal(inputs.grad.reshape(10, 7), rounded(ones @ w.detach().float()))
assert not w.grad.isnan().any() and w.grad.dtype is torch.bfloat16
print("equal")
"""


def run(code: str) -> str:
    """Run Python in a process of its own: kernels are replaced for good."""
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout.strip()


def test_products_are_those_of_float32_rounded_once():
    assert run(CODE) == "equal"


def test_models_get_them_where_the_cpu_needs_them():
    code = (
        "from forgebook.models import cpu_bfloat16\nfrom forgebook.models.load import load_model\n"
        f"load_model({str(TINY_MODEL)!r}, dtype='float32')\nprint(len(cpu_bfloat16._installed))\n"
        f"load_model({str(TINY_MODEL)!r})\nprint(len(cpu_bfloat16._installed))"
    )
    assert run(code).split() == ["0", "1" if is_needed() else "0"]
