"""float32 or bfloat16 on a CPU: by a measurement, which is made once."""

import json
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from forgebook.planning import cpu_dtype
from forgebook.planning.cpu_dtype import bfloat16_speedup, choose_cpu_dtype


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("measured", "dtype", "reason"),
    [
        (2.7, "bfloat16", "measured on this CPU: its matrix products are 2.7 times faster than float32's"),
        (1.2, "float32", "exact; measured on this CPU: bfloat16's matrix products are only 1.2 times faster"),
        (0.5, "float32", "exact; measured on this CPU: bfloat16's matrix products are 2.0 times slower"),
    ],
)
def test_the_faster_one_is_chosen_with_the_figure(monkeypatch, measured, dtype, reason):
    monkeypatch.setattr(cpu_dtype, "_measure", lambda hidden, inner: measured)
    assert choose_cpu_dtype(576, 1536) == (dtype, reason)


def test_a_machine_is_measured_once(monkeypatch, cache):
    answers = iter((2.0, 3.0, 4.0))
    monkeypatch.setattr(cpu_dtype, "_measure", lambda hidden, inner: next(answers))
    assert [bfloat16_speedup(576, 1536), bfloat16_speedup(576, 1536), bfloat16_speedup(256, 768)] == [2.0, 2.0, 3.0]
    [file] = cache.iterdir()
    file.write_text("not JSON")
    assert bfloat16_speedup(576, 1536) == 4.0 and list(json.loads(file.read_text()).values()) == [4.0]


def test_float32_where_nothing_can_be_measured(monkeypatch):
    def absent(name):
        raise cpu_dtype.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cpu_dtype.importlib.metadata, "version", absent)
    dtype, reason = choose_cpu_dtype(576, 1536)
    assert dtype == "float32" and "not measured" in reason


def test_the_first_plan_measures_and_the_second_imports_no_torch():
    code = (
        "import sys\nfrom forgebook.planning.cpu_dtype import bfloat16_speedup\n"
        "print(bfloat16_speedup(4096, 14336), 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, imported), (second, imported_again) = (one.stdout.split() for one in runs)
    assert first == second and 0.01 < float(first) < 100 and (imported, imported_again) == ("True", "False")
