"""One process writes a run."""

import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from forgebook.errors import StorageError
from forgebook.runs import registry, run_lock
from forgebook.runs import run as storage
from forgebook.runs.run_files import LOCK

HOLD = """
import sys
from pathlib import Path
from forgebook.runs.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_writes_is_refused_with_its_id_until_it_is_killed(make_run, make_config, tmp_path):
    run = make_run("run")
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    writer = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "locked\n"
        message = f"run is being written by process {writer.pid} on .*, stop it \\(kill {writer.pid}\\)"
        config = make_config(run_name="run", storage_path=str(tmp_path / "runs"))
        for on_existing in ("resume", "overwrite", "fail"):
            with pytest.raises(StorageError, match=message):
                storage.open_run(config.model_copy(update={"on_existing": on_existing}))
        with pytest.raises(StorageError, match=message):
            registry.delete_model("run", str(tmp_path / "runs"))
        with pytest.raises(StorageError, match=message), run_lock.locked(run.folder):
            pass
        run.summary.unlink()
        with pytest.raises(StorageError, match=message):
            storage.best_checkpoint(run)
    finally:
        writer.kill()
        writer.communicate()
    assert run_lock.writer_of(run.folder) is None and (run.folder / LOCK).exists()
    assert storage.open_run(config) == run


def test_a_lock_is_free_after_its_block_and_known_within(tmp_path):
    folder = tmp_path / "runs/new"
    with run_lock.locked(folder):
        writer = run_lock.writer_of(folder)
        assert writer is not None and writer[0] == str(os.getpid())
        run_lock.check_free(folder)  # this process itself
        with pytest.raises(StorageError, match=f"process {os.getpid()}"), run_lock.locked(folder):
            pass
    assert list(folder.iterdir()) == []
    run_lock.check_free(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"file/run cannot be written: .*set storage_path to another location"),
        run_lock.locked(tmp_path / "file/run"),
    ):
        pass
