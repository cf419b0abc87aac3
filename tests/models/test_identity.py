"""What tells weights of the same name apart."""

import json

from conftest import TINY_MODEL
from forgebook.models.identity import model_identity
from forgebook.runs.checksums import write_checksums


def test_other_weights_are_another_model(tmp_path):
    assert model_identity(str(TINY_MODEL)) == model_identity(str(TINY_MODEL)) != model_identity("owner/name")
    (tmp_path / "model.safetensors").write_text("a")
    write_checksums(tmp_path)
    before = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("b")
    write_checksums(tmp_path)
    assert model_identity(str(tmp_path)) != before


def test_an_adapter_on_another_base_is_another_model(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model.safetensors").write_text("a")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    write_checksums(adapter)
    before = model_identity(str(adapter))
    (base / "model.safetensors").write_text("other")
    assert model_identity(str(adapter)) != before
