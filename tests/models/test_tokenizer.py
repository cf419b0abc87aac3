"""Where a model's files are, and how its tokenizer is loaded; without torch."""

import subprocess
import sys

import pytest

from conftest import REPOSITORY, TINY_MODEL
from forgebook.config.blocks import HubRepo
from forgebook.errors import ModelError, StorageError
from forgebook.models.tokenizer import label_tokens, load_tokenizer, locate, tokenizer_of, tokenizer_source


def test_a_path_is_a_folder_and_another_name_a_hub_id():
    assert locate("tiny") == str(TINY_MODEL)
    assert locate(str(TINY_MODEL)) == str(TINY_MODEL)
    assert locate("owner/name") == "owner/name"
    with pytest.raises(StorageError, match=r"folder \./nothing does not exist"):
        locate("./nothing")


def test_a_hub_that_cannot_be_reached_is_one_readable_sentence():
    with pytest.raises(ModelError, match="no tokenizer could be loaded from 'no-such-owner/no-such-model'"):
        load_tokenizer("no-such-owner/no-such-model")
    with pytest.raises(ModelError, match="no-such-owner/no-such-model could not be fetched from the hub"):
        locate(HubRepo(repo_id="no-such-owner/no-such-model"))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == tokenizer.eos_token and loaded.padding_side == "right"


def test_labels_become_tokens_and_stay_visible(make_config):
    config = make_config(task="classification", classifier_config={"label_tokens": ["[[yes]]", "flim"]})
    assert label_tokens(config) == ["[[yes]]", "flim"] and label_tokens(make_config()) == []
    tokenizer = tokenizer_of(config)
    label = tokenizer.convert_tokens_to_ids("flim")
    assert label in tokenizer("say flim")["input_ids"] and label not in tokenizer("flimsy")["input_ids"]
    assert tokenizer.decode(tokenizer("[[yes]]")["input_ids"], skip_special_tokens=True).endswith("[[yes]]")


def test_a_continued_checkpoint_brings_its_tokenizer(make_config, tmp_path):
    assert tokenizer_source(make_config(initial_base_model_ckpt_path=str(tmp_path))) == str(TINY_MODEL)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_source(make_config(initial_base_model_ckpt_path=str(tmp_path))) == str(tmp_path)


def test_loading_a_tokenizers_module_imports_no_torch():
    code = "import sys, forgebook.models.tokenizer, forgebook.models.families; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"
