"""The layers of helpers/: imports point down, light modules stay light, everything public is named."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

import helpers
from conftest import REPOSITORY

LAYERS = {name: int(layer) for layer, name in re.findall(r"^(\d+)\s+(\w+)", helpers.__doc__ or "", flags=re.MULTILINE)}
MODULES = sorted(path.stem for path in (REPOSITORY / "helpers").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "ray", "transformers", "peft", "accelerate", "deepspeed", "pyarrow", "numpy", "matplotlib"}
LIGHT = """
errors schema catalog retired vllm sources config memory formats rows counting fitting plan plan_text prompts
storage cli
""".split()


def imported_helpers(path) -> set[str]:
    """Name the modules of helpers that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "helpers":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("helpers.")}
    return found


def test_the_map_names_every_module():
    assert sorted(LAYERS) == MODULES and len(MODULES) > 10


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for other in imported_helpers(REPOSITORY / "helpers" / f"{module}.py"):
        assert LAYERS[other] < LAYERS[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_exists_and_is_documented(module):
    loaded = importlib.import_module(f"helpers.{module}")
    assert loaded.__doc__ and loaded.__all__ == sorted(
        loaded.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)
    )
    for name in loaded.__all__:
        value = getattr(loaded, name)
        assert not callable(value) or value.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_gpu_stack(module):
    code = f"import sys, helpers.{module}; print(sorted({HEAVY} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_help_imports_only_what_it_prints():
    code = "import sys; from helpers.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print(sorted({HEAVY | {'pydantic', 'yaml', 'rich'}} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "python main.py CONFIG" in printed.stdout and printed.stdout.strip().endswith("[]")


def test_main_is_small():
    assert len((REPOSITORY / "main.py").read_text().splitlines()) <= 60
