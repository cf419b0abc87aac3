"""The run folder: opened, found and removed, on disk and in a bucket."""

import pytest

from helpers import storage
from helpers.errors import StorageError
from helpers.launch import fine_tune


def test_a_run_is_found_by_folder_and_by_name(make_config, monkeypatch, tmp_path):
    run = fine_tune(make_config())
    monkeypatch.chdir(tmp_path)
    assert storage.find_run("run") == storage.find_run(str(run.folder)) == run
    with pytest.raises(StorageError, match="no run 'other'"):
        storage.find_run("other")
