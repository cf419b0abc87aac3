"""What a model's config.json says of its context; families are rows of catalog.yaml."""

import json
import shutil

import pytest

from conftest import TINY_MODEL
from forgebook.catalog import read_catalog, shape_of
from forgebook.errors import ModelError
from forgebook.models.families import context_limit, native_context_length

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_the_context_limit_grows_with_rope_scaling():
    source = str(TINY_MODEL)
    assert native_context_length(source) == context_limit(source) == 1024
    assert context_limit(source, {"rope_type": "linear", "factor": 2.0}) == 2048
    assert context_limit(source, {**LLAMA3, "original_max_position_embeddings": 256}) == 2048


def test_a_model_without_positions_has_no_limit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert context_limit(str(tmp_path)) is None
    with pytest.raises(ModelError, match="has no max_position_embeddings: set context_length"):
        native_context_length(str(tmp_path))


def test_a_broken_config_is_one_readable_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ModelError, match="no model could be loaded from"):
        context_limit(str(tmp_path))


def test_a_family_is_added_by_a_row_of_the_catalog_alone(tmp_path, monkeypatch):
    """A family like Llama with two more norms per layer and norms of queries and keys, in a copy of the catalog."""
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(settings | {"model_type": "newcomer"}))
    with pytest.raises(ModelError, match="has model_type 'newcomer': the shape is known for llama"):
        shape_of(str(tmp_path / "model"))
    tiny, parameters = shape_of("tiny"), shape_of("tiny").parameters
    own = tmp_path / "own.yaml"
    own.write_text(
        "prices: {date: 2026-01, source: our own}\ngpus: {}\nmodels: []\n"
        "families: {newcomer: {architecture: NewcomerForCausalLM, norms: 4, qk_norm: true}}\n"
    )
    monkeypatch.setenv("FORGEBOOK_CATALOG", str(own))
    added = tiny.layers * (2 * tiny.hidden + 2 * tiny.head_dim)
    assert shape_of(str(tmp_path / "model")).parameters == parameters + added


def test_every_shape_of_the_catalog_belongs_to_a_counted_family():
    catalog = read_catalog()
    assert all(catalog.families[shape.model_type].counted for shape in catalog.shapes.values())
