"""Answers about images: those of plain transformers, alike in a batch and alone, and of the trained run."""

import base64
import gc
import io
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from test_server import running

from conftest import TINY_MODEL
from forgebook.data.examples import read_examples
from forgebook.errors import DataError
from forgebook.inference.batch import read_prompts, write_answers
from forgebook.inference.chat import chat
from forgebook.inference.loading import load_together
from forgebook.inference.prompt_images import read_conversation
from forgebook.inference.sampling import Sampling
from forgebook.models.processor import load_processor
from support_vision import FAMILIES, draw, image_row, save_vision_model

SIZES = [(80, 60), (180, 56), (56, 120)]  # of several rows and columns of tokens


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    colors = ("navy", "maroon", "green")
    return [str(draw(folder / f"{k}.png", f"n{k}", size, colors[k])) for k, size in enumerate(SIZES)]


def asked(text, *paths, after=()):
    parts = [{"type": "image_url", "image_url": {"url": path}} for path in paths]
    parts += [{"type": "text", "text": text}, *({"type": "image", "image": path} for path in after)]
    return [{"role": "user", "content": parts}]


def conversations(pictures):
    """Of different numbers of images, one without."""
    return [
        asked("What?", pictures[0]),
        asked("Which of both is that?", pictures[1], pictures[2]),
        [{"role": "user", "content": "Hello there, my friend"}],
        asked("And this one here?", after=[pictures[2]]),
    ]


def plain_answer(loaded, messages, count):
    """Answer as a script on plain transformers does."""
    source = loaded.source
    processor = load_processor(source, loaded.tokenizer)
    turns, images = [], []
    for message in messages:
        parts = message["content"]
        parts = parts if isinstance(parts, list) else [{"type": "text", "text": parts}]
        paths = [part["image_url"]["url"] if "image_url" in part else part.get("image") for part in parts]
        images += [Image.open(path).convert("RGB") for path in paths if path]
        turns.append(
            {"role": message["role"], "content": [p if p["type"] == "text" else {"type": "image"} for p in parts]}
        )
    text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
    loaded.model.generation_config = loaded.generation_config
    ends = {"eos_token_id": loaded.generation_config.eos_token_id, "tokenizer": loaded.tokenizer}
    output = loaded.model.generate(**inputs, max_new_tokens=count, do_sample=False, **ends)
    return loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_transformers_in_batches_and_alone(family, pictures, tmp_path):
    [loaded] = load_together([save_vision_model(family, tmp_path)], "float32")
    with torch.no_grad():  # random as they are, images change no answer
        for name, parameter in loaded.model.named_parameters():
            if any(part in name for part in ("projector", "connector", "merger")) and parameter.ndim == 2:
                parameter.mul_(30)
            if "q_proj.weight" in name or "k_proj.weight" in name:  # nor does it matter where a token stands
                parameter.mul_(30)
    prompts = conversations(pictures)
    answers = loaded.answer(prompts, max_new_tokens=10)
    assert answers == [plain_answer(loaded, messages, 10) for messages in prompts]
    assert answers == loaded.answer(prompts, max_new_tokens=10, batch_size=2)  # prompts join as others end
    assert answers == [loaded.answer([messages], max_new_tokens=10)[0] for messages in prompts]
    other = loaded.answer([asked("What?", pictures[1])], max_new_tokens=10)
    assert family == "Gemma 3" or other != answers[:1]  # its random encoder makes nearly the same of both


def test_a_model_of_text_alone_rejects_images(pictures):
    [loaded] = load_together([TINY_MODEL], "float32")
    with pytest.raises(DataError, match="reads text alone: leave it out, or use another model"):
        loaded.answer([asked("What?", pictures[0])], max_new_tokens=2)
    assert loaded.answer([[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]], max_new_tokens=2) == (
        loaded.answer([[{"role": "user", "content": "Hi"}]], max_new_tokens=2)
    )


def test_what_is_wrong_with_an_image_is_reported_with_its_message(tmp_path, pictures):
    [loaded] = load_together([save_vision_model("SmolVLM", tmp_path / "model")], "float32")
    (tmp_path / "text.png").write_text("no image")
    first = [{"role": "system", "content": "Be short."}]
    for path, message in (
        ("gone.png", r"messages\[1\]: image 2 of 2: the image .*gone.png does not exist"),
        (str(tmp_path), r"messages\[1\]: image 2 of 2: .* is a folder; expected an image"),
        (str(tmp_path / "text.png"), r"messages\[1\]: image 2 of 2: .*text.png: not an image"),
    ):
        with pytest.raises(DataError, match=message):
            loaded.answer([first + asked("What?", pictures[0], path)], max_new_tokens=2)


def test_relative_paths_begin_at_a_folder():
    [message] = read_conversation(asked("What?", "a.png"), "/data")
    assert message["images"][0].uri == "/data/a.png"


@pytest.mark.parametrize("family", ["SmolVLM", "Qwen 2.5 VL"])
def test_served_answers_are_those_of_generate(family, pictures, tmp_path, monkeypatch):
    """OpenAI's own client sends data URIs, at the same time and one streamed; no path reaches the disk."""
    folder = Path(save_vision_model(family, tmp_path / "scans"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uris = [f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in pictures]
    asked_of_server = [*conversations(uris)[:3], asked("And this one here?", uris[2])]
    expected = load_together([folder], "float32")[0].answer(
        [*conversations(pictures)[:3], asked("And this one here?", pictures[2])], max_new_tokens=10
    )
    with running({"scans": folder}) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)

        def answer(messages, **settings):
            return client.chat.completions.create(model="scans", messages=messages, max_tokens=10, **settings)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda one: answer(one).choices[0].message.content, asked_of_server))
        assert answers == expected
        chunks = answer(asked_of_server[1], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected[1]
        for bad in (
            asked("What?", pictures[0]),
            asked("What?", f"file://{pictures[0]}"),
            asked("What?", after=[pictures[0]]),
            asked("What?", f"{address}/health"),
            [{"from": "user", "value": asked("What?", f"file://{pictures[0]}")[0]["content"]}],
            [{"role": "user", "content": "What?", "images": [pictures[0]]}],
            [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": uris[0]}}]}, *asked("So?")],
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                answer(bad)
            assert caught.value.param == "messages"
        until = time.monotonic() + 10  # images are kept no longer than their answer
        while kept := list(tmp_path.glob("forgebook-images-*/*")):
            gc.collect()
            time.sleep(0.05)
            assert time.monotonic() < until, kept


def test_prompts_of_a_file_and_of_a_chat_have_images(pictures, tmp_path, monkeypatch, capsys):
    source = save_vision_model("Qwen 2.5 VL", tmp_path / "scans")
    rows = [image_row("What?", "seven", pictures[0]), {"messages": asked("And this?", pictures[1])}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"))
    [loaded] = load_together([source])
    expected = loaded.answer([asked("What?", pictures[0]), asked("And this?", pictures[1])], max_new_tokens=6)
    out = tmp_path / "answers.jsonl"
    assert write_answers(out, source, prompts[:1], Sampling(max_new_tokens=6)) == 1
    assert write_answers(out, source, prompts, Sampling(max_new_tokens=6)) == 1  # the first is there
    answers = read_examples(str(out), "vision_language")  # they can be trained on as they are
    assert [one.messages[-1]["content"] for one in answers] == expected
    assert [one.messages[0]["images"][0].uri for one in answers] == pictures[:2]
    lines = [f"/image {pictures[0]}", "What?", "/image gone.png", "/exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(loaded, Sampling(max_new_tokens=6))
    printed = capsys.readouterr().out
    assert f"(an image of 80 x 60 pixels, with your next message)\n{expected[0]}\n" in printed
    assert "gone.png does not exist)" in printed
