import copy
import pickle

import PIL.Image
import pytest

from forgebook.data import masking
from forgebook.data.image_tokens import ImageTokens, files_of
from forgebook.data.images import IMAGE, Image
from forgebook.errors import DataError
from forgebook.models.processor import load_processor
from forgebook.models.tokenizer import load_tokenizer
from support_vision import FAMILIES, draw, save_vision_model


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    tokenizer = load_tokenizer(save_vision_model("SmolVLM", folder))
    return tokenizer, ImageTokens(load_processor(str(folder), tokenizer))


def talk(folder, *contents):
    """Alternate questions and answers; each IMAGE is another picture."""
    turns = []
    for k, content in enumerate(contents):
        images = [Image(str(draw(folder / f"{k}-{n}.png", size=(40 + k, 30)))) for n in range(content.count(IMAGE))]
        turns.append(
            {"role": ("user", "assistant")[k % 2], "content": content} | ({"images": images} if images else {})
        )
    return turns


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_familys_processor(family, tmp_path):
    tokenizer = load_tokenizer(save_vision_model(family, tmp_path / "model"))
    processor = load_processor(str(tmp_path / "model"), tokenizer)
    images = ImageTokens(processor)
    messages = images.checked(talk(tmp_path, f"{IMAGE}{IMAGE}\nWhat?", "It.", f"Or {IMAGE}?", "This."))
    [[encoded]] = masking.encode_many([(messages, None)], tokenizer, images=images)
    text = tokenizer.apply_chat_template(
        [as_written(m, "+ ''" in tokenizer.chat_template) for m in messages], tokenize=False
    )
    pictures = [[PIL.Image.open(file.path) for file in files_of(messages)]]
    theirs = processor(text=[text], images=pictures, add_special_tokens=False)["input_ids"][0]
    assert encoded.input_ids == list(theirs) and len(encoded.images) == 3
    # Nothing of an image is in the loss, and all that its family writes for it is within its place.
    inside = {k for one in encoded.images for k in range(one.start, one.stop)}
    marks = set(processor.image_token_ids)
    assert {k for k, token in enumerate(encoded.input_ids) if token in marks} <= inside
    assert not any(encoded.loss_mask[k] for k in inside)
    supervised = [token for token, on in zip(encoded.input_ids, encoded.loss_mask, strict=True) if on]
    assert tokenizer.decode(supervised) == "It.<|end|>This.<|end|>"
    # A prompt is the beginning of its example.
    prompt = masking.encode_image_prompt(messages[:3], tokenizer, images)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids and prompt.images == encoded.images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tag", ["", "<|end|> "], ids=["plain", "special tokens as text"])
def test_the_place_of_an_image_holds_its_tokens_and_no_others(family, tag, tmp_path):
    tokenizer = load_tokenizer(save_vision_model(family, tmp_path / "model"))
    processor = load_processor(str(tmp_path / "model"), tokenizer)
    images = ImageTokens(processor)
    messages = images.checked(talk(tmp_path, f"see {tag}{IMAGE}now {IMAGE}", "It.", f"Or{IMAGE}?", "This."))
    [[encoded]] = masking.encode_many([(messages, None)], tokenizer, images=images)
    for one in encoded.images:
        inputs = {"images": [[PIL.Image.open(one.file.path)]], "text": [processor.image_token]}
        [alone] = processor(**inputs, add_special_tokens=False)["input_ids"]
        assert encoded.input_ids[one.start : one.stop] == list(alone)


def as_written(message, is_plain):
    if is_plain and message["role"] != "user":
        return message
    parts = []
    for number, text in enumerate(message["content"].split(IMAGE)):
        parts += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return {"role": message["role"], "content": parts}


def test_special_tokens_in_a_text_are_characters_and_no_image(smolvlm, tmp_path):
    tokenizer, images = smolvlm
    messages = images.checked(talk(tmp_path, f"{IMAGE}Is <image> a tag?", "Yes, <image><|end|> is."))
    [[encoded]] = masking.encode_many([(messages, None)], tokenizer, images=images)
    [one] = encoded.images
    mark = tokenizer.convert_tokens_to_ids("<image>")
    assert all(one.start <= k < one.stop for k, token in enumerate(encoded.input_ids) if token == mark)
    supervised = [token for token, on in zip(encoded.input_ids, encoded.loss_mask, strict=True) if on]
    assert tokenizer.decode(supervised) == "Yes, <image><|end|> is.<|end|>"


def test_an_image_that_cannot_be_opened_is_named(smolvlm, tmp_path):
    _, images = smolvlm
    messages = talk(tmp_path, "q", "a", f"{IMAGE}{IMAGE}", "b")
    (tmp_path / "2-1.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"messages\[2\]: image 2 of 2: .*2-1.png: not an image"):
        images.checked(messages)


def test_a_template_that_hides_an_image_is_an_error(smolvlm, tmp_path):
    tokenizer, images = smolvlm
    text_alone = copy.deepcopy(tokenizer)
    text_alone.chat_template = SHOWS_TEXT
    messages = images.checked(talk(tmp_path, f"{IMAGE}What?", "It."))
    [error] = masking.encode_many([(messages, None)], text_alone, images=images)
    assert "writes <image> 0 times for 1 images" in str(error)


SHOWS_TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_it_is_copied_and_sent_without_its_memory(smolvlm):
    _, images = smolvlm
    for other in (copy.deepcopy(images), pickle.loads(pickle.dumps(images))):
        assert other.key == images.key and other.processor is not images.processor
