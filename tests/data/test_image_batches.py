"""The loss of examples with images equals that of plain transformers on the same batch, for each family."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from forgebook.data.data_sources import find_sources
from forgebook.data.image_batches import Pixels
from forgebook.data.image_tokens import ImageTokens
from forgebook.data.tokenize import EncodingOptions, tokenize
from forgebook.errors import TrainingError
from forgebook.models.load import load_model
from forgebook.models.processor import load_processor
from forgebook.models.tokenizer import load_tokenizer
from forgebook.training.losses import SupervisedLM
from forgebook.training.reference import ExampleSet
from support_vision import FAMILIES, draw, image_row, save_vision_model

# Of different sizes and numbers, one example without an image among them.
SIZES = [(40, 30), (90, 28), (28, 60)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for k, size in enumerate(SIZES):
        draw(folder / f"{k}.png", f"n{k}", size, ("navy", "maroon", "green")[k])
    written = [
        image_row("What number?", "It is zero.", "0.png"),
        image_row("Which of both?", "The second one.", "1.png", "2.png"),
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]},
        image_row("And this?", "Two.", "2.png", system="Be short."),
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path, written


def plain_loss(model, processor, tokenizer, rows, folder):
    """Sum the loss as a script on plain transformers does: its processor, its labels, its logits."""
    texts, images = [], []
    for row in rows:
        turns = [{"role": one["role"], "content": as_parts(one["content"])} for one in row["messages"]]
        if "message['content'] + ''" in tokenizer.chat_template:  # it reads lists of a user alone
            turns = [t if t["role"] == "user" else t | {"content": t["content"][0]["text"]} for t in turns]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        urls = [part["image_url"]["url"] for part in row["messages"][-2]["content"] if "image_url" in part]
        images.append([Image.open(folder / url).convert("RGB") for url in urls])
    images = [one for one in images if one]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    for line, targets in zip(ids.tolist(), labels, strict=True):
        start = line.index(begin) + 1
        stop = line.index(end, start) + 1
        targets[start:stop] = torch.tensor(line[start:stop])
    return model(**inputs, labels=labels).loss * (labels != -100).sum()


def as_parts(content):
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [{"type": "image"} if part["type"] == "image_url" else part for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_plain_transformers(family, rows, tmp_path):
    path, written = rows
    source = save_vision_model(family, tmp_path / "model")
    tokenizer = load_tokenizer(source)
    processor = load_processor(source, tokenizer)
    model = load_model(source, dtype="float32", reads_images=True).eval()
    tokens, notes = tokenize(
        find_sources(str(path)), tokenizer, EncodingOptions("vision_language"), tmp_path / ".tokens",
        images=ImageTokens(processor, tmp_path / ".tokens/images"),
    )  # fmt: skip
    assert not notes.problems, notes.problems
    examples = ExampleSet(tokens, tokenizer.pad_token_id, torch.device("cpu"), pixels=Pixels(processor, "float32"))
    wrapped = SupervisedLM(model, reads_images=True)

    def total(numbers):
        return wrapped(**examples.batch(list(np.array(numbers)[:, None])))

    units = tokens.supervised.sum()
    ours = total([0, 1, 2, 3]) / units
    with_images, text_alone = [written[0], written[1], written[3]], written[2:3]
    parts = [plain_loss(model, processor, tokenizer, rows, path.parent) for rows in (with_images, text_alone)]
    assert ours.item() == pytest.approx((sum(parts) / units).item(), abs=1e-5)
    # However the batch is divided, also where a part has no image.
    assert ((total([0, 1]) + total([2]) + total([3])) / units).item() == pytest.approx(ours.item(), abs=1e-5)


def test_an_image_after_the_last_answer_in_the_loss_is_not_computed(rows, tmp_path):
    path, written = rows
    first = written[0]["messages"]
    later = image_row("And now?", "No.", "1.png")["messages"]
    whole = {"messages": [*first, later[0], later[1] | {"weight": 0}]}
    data = path.parent / "later.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (written[0], whole)))
    source = save_vision_model("SmolVLM", tmp_path / "model")
    tokenizer = load_tokenizer(source)
    images = ImageTokens(load_processor(source, tokenizer), tmp_path / ".tokens/images")
    options = EncodingOptions("vision_language")
    tokens, _ = tokenize(find_sources(str(data)), tokenizer, options, tmp_path / ".tokens", images=images)
    assert [len(tokens.images_of(k)) for k in range(2)] == [1, 2]
    pixels = Pixels(images.processor, "float32")
    examples = ExampleSet(tokens, tokenizer.pad_token_id, torch.device("cpu"), pixels=pixels)
    one, two = (examples.batch([np.array([k])]) for k in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_image_that_changes_during_a_run_stops_it(tmp_path):
    draw(tmp_path / "0.png", "old")
    (tmp_path / "rows.jsonl").write_text(json.dumps(image_row("q", "a", "0.png")))
    source = save_vision_model("SmolVLM", tmp_path / "model")
    tokenizer = load_tokenizer(source)
    images = ImageTokens(load_processor(source, tokenizer), tmp_path / ".tokens/images")
    options = EncodingOptions("vision_language")
    sources = find_sources(str(tmp_path / "rows.jsonl"))
    tokens, _ = tokenize(sources, tokenizer, options, tmp_path / ".tokens", images=images)
    pixels = Pixels(images.processor, "float32")
    examples = ExampleSet(tokens, tokenizer.pad_token_id, torch.device("cpu"), pixels=pixels)
    first = examples.batch([np.array([0])])
    draw(tmp_path / "0.png", "new")
    with pytest.raises(TrainingError, match="was changed after its example was tokenized"):
        examples.batch([np.array([0])])
    assert first["pixel_values"].shape[1:] == (5, 3, 28, 28)


def test_batches_made_in_several_threads_are_those_made_one_by_one(rows, tmp_path, monkeypatch):
    path, _ = rows
    source = save_vision_model("SmolVLM", tmp_path / "model")
    tokenizer = load_tokenizer(source)
    images = ImageTokens(load_processor(source, tokenizer), tmp_path / ".tokens/images")
    options = EncodingOptions("vision_language")
    tokens, _ = tokenize(find_sources(str(path)), tokenizer, options, tmp_path / ".tokens", images=images)
    examples = ExampleSet(
        tokens, tokenizer.pad_token_id, torch.device("cpu"), pixels=Pixels(images.processor, "float32")
    )
    parts = [[np.array([k % len(tokens)]), np.array([(k + 1) % len(tokens)])][: 1 + k % 2] for k in range(12)]
    monkeypatch.setattr("forgebook.training.reference.threads_for", lambda on_gpu: 4)
    for part, (batch, _) in zip(parts, examples.batches(parts), strict=True):
        alone = examples.batch(part)
        assert batch.keys() == alone.keys() and all(torch.equal(batch[name], alone[name]) for name in alone)
