"""A run records which version of its models it uses, and stops where it is another."""

import pytest

from conftest import TINY_MODEL, config_for
from forgebook.errors import StorageError
from forgebook.models import versions
from forgebook.models.versions import check_versions, model_versions


def test_a_models_folder_in_a_bucket(s3):
    s3.put_object(Bucket="forgebook", Key="model/config.json", Body=b"{}")
    config = config_for(str(TINY_MODEL), initial_base_model_ckpt_path="s3://forgebook/model")
    recorded = model_versions(config)
    assert list(recorded) == ["initial_base_model_ckpt_path"]
    check_versions(recorded, config)
    s3.put_object(Bucket="forgebook", Key="model/model.safetensors", Body=b"new")
    with pytest.raises(StorageError, match=r"initial_base_model_ckpt_path: s3://forgebook/model has changed since"):
        check_versions(recorded, config)
    check_versions({}, config)


def test_the_commit_of_a_hub_model(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGEBOOK_MODELS", str(tmp_path))
    commits = iter([tmp_path / "snapshots/abc/config.json", tmp_path / "snapshots/def/config.json"])
    monkeypatch.setattr(versions, "cached_file", lambda source, name: next(commits))
    config = config_for("org/model")
    recorded = model_versions(config)
    assert recorded == {"model_id": "abc"}
    with pytest.raises(StorageError, match=r"model_id: org/model has changed .*it was abc, it is def"):
        check_versions(recorded, config)
