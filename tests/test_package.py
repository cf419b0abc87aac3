"""`pip install .` gives the command, and everything that it reads next to the package."""

import fnmatch
import importlib
import subprocess
import tomllib

from setuptools import find_namespace_packages

from conftest import REPOSITORY

SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_file_that_the_engine_reads_is_installed():
    settings = SETTINGS["tool"]["setuptools"]
    packages = find_namespace_packages(str(REPOSITORY), include=settings["packages"]["find"]["include"])
    assert {"forgebook.cli", "helpers", "tiny_model", "deepspeed_configs"} <= set(packages)
    patterns = [*settings["package-data"]["*"], "*.py"]
    folders = ("forgebook", "helpers", "tiny_model", "deepspeed_configs")
    files = subprocess.run(["git", "ls-files", *folders], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    left_out = [name for name in files.stdout.split() if not any(fnmatch.fnmatch(name, p) for p in patterns)]
    assert [name for name in left_out if not name.endswith("README.md")] == []


def test_the_command_is_the_function_that_main_py_calls():
    module, _, function = SETTINGS["project"]["scripts"]["forgebook"].partition(":")
    assert getattr(importlib.import_module(module), function) is importlib.import_module("main").main
