"""A build that was killed does not stop the runs after it."""

import os
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY
from forgebook.training.setup import STALE_LOCK_SECONDS, build_extensions, extensions_folder


def test_an_environment_has_a_folder_of_its_own(monkeypatch, tmp_path):
    own = extensions_folder()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert extensions_folder() != own
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path


def test_nothing_is_built_for_a_gpu_without_offloading(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    build_extensions({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, on_cpu=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_what_a_killed_build_left_behind_is_removed():
    """torch would wait for this file without end; one that may be in use is left alone."""
    code = "from forgebook.training.setup import build_extensions; build_extensions({}, on_cpu=True)"

    def build():
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=600, capture_output=True)

    build()
    left_behind = extensions_folder() / "deepspeed_shm_comm" / "lock"
    left_behind.touch()
    then = time.time() - 2 * STALE_LOCK_SECONDS
    os.utime(left_behind, (then, then))
    build()
    assert not left_behind.exists()
