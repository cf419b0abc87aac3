import json

import pytest

from conftest import TINY_MODEL, config_for
from forgebook.errors import ModelError
from forgebook.models.processor import copy_processor, load_processor, processor_of, reads_images
from forgebook.models.tokenizer import load_tokenizer
from support_vision import FAMILIES, save_vision_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_is_of_its_published_class_around_our_tokenizer(family, tmp_path):
    source = save_vision_model(family, tmp_path / "model")
    tokenizer = load_tokenizer(source)
    processor = load_processor(source, tokenizer)
    assert type(processor).__name__ == FAMILIES[family]["processor"][0] and processor.tokenizer is tokenizer
    assert type(processor.image_processor).__name__ == FAMILIES[family]["pixels"][0]
    # A copy of its files loads the same, without the model they were published with but its config.
    other = tmp_path / "checkpoint"
    other.mkdir()
    tokenizer.save_pretrained(other)
    (other / "config.json").write_text((tmp_path / "model/config.json").read_text())
    copy_processor(source, other)
    again = load_processor(str(other), load_tokenizer(str(other)))
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.chat_template == tokenizer.chat_template


def test_a_model_of_text_alone_is_refused(tokenizer):
    assert not reads_images(str(TINY_MODEL))
    with pytest.raises(ModelError, match="reads no images, which vision_language_config needs"):
        load_processor(str(TINY_MODEL), tokenizer)
    assert processor_of(config_for(str(TINY_MODEL)), tokenizer) is None


def test_the_template_of_an_older_processor_is_the_tokenizers(tmp_path):
    source = save_vision_model("LLaVA", tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(source).chat_template == template
