"""The embedded vision-language model reads what its README says, and the receipts are always the same."""

import importlib.util
import random
import sys

import pytest
import torch
from transformers import AutoTokenizer, Idefics3ForConditionalGeneration

from conftest import REPOSITORY

FOLDER = REPOSITORY / "tiny_vision_model"


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "data"))
    spec = importlib.util.spec_from_file_location("pretrain", FOLDER / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("make_receipts", None)


def test_its_tower_reads_sheets_that_it_has_not_seen(pretrain):
    model = Idefics3ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    characters = torch.tensor(tokenizer.convert_tokens_to_ids(["Ġ", *pretrain.CHARACTERS[1:]]))
    pixels, numbers = pretrain.draw_batch(random.Random(12345), 16)
    with torch.no_grad():
        vectors = torch.stack(list(model.model.get_image_features(pixels[:, None]).pooler_output))
        _, read = pretrain.reading_loss(vectors, numbers, model.get_input_embeddings().weight[characters])
    assert read > 0.99


def test_receipts_are_drawn_alike_each_time(pretrain, tmp_path):
    receipts = sys.modules["make_receipts"]
    for folder in ("one", "two"):
        receipts.write_split(tmp_path / folder, "test", 5, 0)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 6
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
