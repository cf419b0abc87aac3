"""The chat page of `serve --ui`: over HTTP, and clicked through in a browser where Chromium is installed."""

import base64
import hashlib
import json
import math
import re

import httpx
import pytest
import torch
from test_server import running

import support_browser
from conftest import LORA, TINY_MODEL, chat
from forgebook.data.masking import encode_prompt
from forgebook.errors import ConfigError
from forgebook.inference import chat_page
from forgebook.inference.loading import load_for_generation
from forgebook.inference.server import name_models, serve, with_bases
from support_browser import ENTER, ESCAPE, RIGHT, open_browser

QUESTION = [{"role": "user", "content": "what is it"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run that has learned to say `a lamp`, and to call a tool."""
    from forgebook.config.parse import load_config
    from forgebook.launch.fine_tune import fine_tune

    folder = tmp_path_factory.mktemp("page")
    asking = {"role": "user", "content": "the weather of Oslo"}
    calling = {"messages": [asking, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [WEATHER]}
    rows = [*[chat("what is it", "a lamp 7") for _ in range(12)], *[calling] * 6]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lamp.yaml").write_text(json.dumps({
        "model_id": str(TINY_MODEL), "train_path": str(folder / "rows.jsonl"), "run_name": "lamp",
        "task": "instruction_tuning", "storage_path": str(folder / "runs"), "num_devices": 0, "num_epochs": 8,
        "train_batch_size_per_device": 6, "learning_rate": 1e-2, "num_warmup_steps": 1, "dtype": "float32",
        "deepspeed": "none", "gradient_checkpointing": False, "lora_config": LORA,
    }))  # fmt: skip
    return fine_tune(load_config(folder / "lamp.yaml"))


@pytest.fixture(scope="module")
def served(run):
    """Serve the run and its base with the page; yield the address and the engine."""
    folders, defaults = with_bases(name_models([str(run.folder)]))
    with running(folders, defaults=defaults, ui=True) as (address, engine):
        yield address, engine


def test_the_base_is_served_beside_the_run_and_shares_its_weights(served):
    address, engine = served
    assert [one["id"] for one in httpx.get(f"{address}/v1/models").json()["data"]] == ["lamp", "base"]
    assert engine.models["lamp"].loaded.model is engine.models["base"].loaded.model
    assert engine.models["base"].loaded.adapter is None


def test_the_page_is_self_contained_and_its_policy_lets_nothing_else_in(served):
    response = httpx.get(f"{served[0]}/")
    html, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html") and html.startswith("<!doctype html>")
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(|innerHTML|eval\(", html)
    assert policy == chat_page.read_page()[1]


def test_the_page_is_there_only_if_requested(run):
    with running(name_models([str(run.folder)])) as (address, _):
        assert httpx.get(f"{address}/").status_code == 404


def test_the_page_needs_no_key_and_its_requests_do(run):
    with running(name_models([str(run.folder)]), ui=True, key="open sesame") as (address, _):
        assert httpx.get(f"{address}/").status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert "open sesame" not in httpx.get(f"{address}/").text


def test_vllm_and_a_run_called_base_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="leave engine=vllm out"):
        serve([str(run.folder)], engine="vllm", ui=True)
    checkpoint = next(run.checkpoints.glob("epoch-*"))
    with pytest.raises(ConfigError, match="rename the run"):
        with_bases({"base": checkpoint})


def completion(address, **values) -> dict:
    body = {"model": "lamp", "messages": QUESTION, "max_tokens": 8, "temperature": 0, **values}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_logprobs_are_those_of_the_model(served, run):
    """Against one forward pass over prompt and answer, by transformers."""
    entries = completion(served[0], logprobs=True, top_logprobs=3)["logprobs"]["content"]
    model, tokenizer, prompt_format = load_for_generation(next(run.checkpoints.glob("epoch-*")))
    prompt = encode_prompt(QUESTION, tokenizer, prompt_format)
    answer = tokenizer("".join(entry["token"] for entry in entries), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        chances = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    assert len(entries) == len(answer) >= 3
    for entry, token, row in zip(entries, answer, chances, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        top = [one["logprob"] for one in entry["top_logprobs"]]
        assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-4) and top[0] == entry["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_logprobs_of_the_base_are_others_and_of_a_sampled_answer_before_the_temperature(served):
    tuned, base = (completion(served[0], model=name, logprobs=True)["logprobs"]["content"] for name in ("lamp", "base"))
    assert tuned[0]["logprob"] != base[0]["logprob"] and tuned[0]["top_logprobs"] == []
    hot = completion(served[0], logprobs=True, temperature=1e-8)["logprobs"]["content"]
    assert [one["logprob"] for one in hot] == pytest.approx([one["logprob"] for one in tuned], abs=1e-5)


def test_a_streamed_answer_has_the_logprobs_of_each_token_once(served):
    whole = completion(served[0], logprobs=True, top_logprobs=2)["logprobs"]["content"]
    body = {"model": "lamp", "messages": QUESTION, "max_tokens": 8, "temperature": 0, "stream": True}
    body |= {"logprobs": True, "top_logprobs": 2}
    with httpx.stream("POST", f"{served[0]}/v1/chat/completions", json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    streamed = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in whole]
    assert [one["logprob"] for one in streamed] == pytest.approx([one["logprob"] for one in whole], abs=1e-5)


# -- in a browser


@pytest.fixture(scope="module")
def browser():
    if missing := support_browser.missing():
        pytest.skip(f"{missing} not found: apt-get install chromium chromium-driver")
    with open_browser() as one:
        yield one


ANSWERED = "document.querySelectorAll('.turn .meta:not(:empty)').length === {}"


def test_a_visitor_compares_the_models(served, browser):
    browser.open(served[0])
    browser.requested()  # of the browser's own start page
    browser.open(served[0])
    browser.wait("document.querySelectorAll('.panel').length === 2")
    assert browser.run("return [...document.querySelectorAll('.panel select')].map(one => one.value)") == [
        "base",
        "lamp",
    ]
    browser.type("#message", "what is it" + ENTER)
    browser.wait(ANSWERED.format(2))
    base, tuned = browser.run(
        "return [...document.querySelectorAll('.turn.assistant .text')].map(one => one.innerText)"
    )
    assert tuned == completion(served[0])["message"]["content"] == "a lamp 7" != base
    browser.type("#message", "what is it" + ENTER)  # a second turn holds the first
    browser.wait(ANSWERED.format(4))
    browser.hover(".panel:nth-child(2) .token")
    tip = browser.wait("!document.querySelector('#tip').hidden && document.querySelector('#tip').innerText")
    first = completion(served[0], logprobs=True)["logprobs"]["content"][0]
    assert f"{100 * math.exp(first['logprob']):.1f}%" in tip and tip.count("%") == 5
    assert browser.requested() == {f"{served[0]}/{path}" for path in ("", "v1/models", "v1/chat/completions")}
    assert [entry for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_keyboard_is_enough(served, browser):
    browser.open(served[0])
    browser.wait("document.querySelectorAll('.panel').length === 2")
    assert browser.run("return document.activeElement.id") == "message"
    browser.press(*"what is it", ENTER)
    browser.wait(ANSWERED.format(2))
    browser.run("document.querySelector('.panel:nth-child(2) .token[tabindex=\"0\"]').focus()")
    before = browser.run("return document.activeElement.textContent")
    browser.press(RIGHT)
    assert browser.run("return document.activeElement.className") == "token"
    assert browser.run("return document.activeElement.textContent") != before
    assert browser.run("return !document.querySelector('#tip').hidden")
    browser.press(ESCAPE)
    assert browser.run("return document.querySelector('#tip').hidden")


def test_tools_settings_and_stop(served, browser):
    browser.open(served[0])
    browser.wait("document.querySelectorAll('.panel').length === 2")
    browser.click("#compare")
    browser.wait("document.querySelectorAll('.panel').length === 1")
    browser.click("summary")
    browser.type("#tools", json.dumps([WEATHER]))
    assert browser.run("return document.querySelector('#tools-state').textContent") == "1 offered: weather"
    browser.type("#message", "the weather of Oslo" + ENTER)
    browser.wait(ANSWERED.format(1))
    call = browser.run("return document.querySelector('.call').innerText")
    assert "calls weather" in call and '"city": "Oslo"' in call
    browser.type("#tools", "]")
    assert "Not valid" in browser.run("return document.querySelector('#tools-state').textContent")
    browser.run("document.querySelector('#tools').value = ''")
    browser.type("#message", "what is it")
    escape = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))"
    browser.run(f"document.querySelector('#form').requestSubmit(); {escape}")  # before any token
    browser.wait("document.querySelector('#stop').hidden && !document.querySelector('#send').disabled", 10)
    assert len(browser.run("return [...document.querySelectorAll('.turn.assistant .meta:not(:empty)')]")) == 1
    assert browser.run("return document.querySelector('.turn:last-child .text').textContent") == ""


def test_a_key_is_asked_for_and_kept_in_the_tab(run, browser):
    with running(name_models([str(run.folder)]), ui=True, key="open sesame") as (address, _):
        browser.open(address)
        browser.wait("document.querySelector('#notice').innerText.includes('needs its key')")
        browser.type("#key", "open sesame\t")
        browser.wait("document.querySelectorAll('.panel').length === 1 && document.querySelector('#notice').hidden")
        browser.type("#message", "what is it" + ENTER)
        browser.wait(ANSWERED.format(1))
        assert "a lamp 7" in browser.text() and browser.run("return localStorage.getItem('key')") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_themes(served, browser, scheme):
    """The contrast of text and page is at least 7:1, of the softer text 4.5:1 (WCAG)."""
    browser.prefers(scheme)
    browser.open(served[0])
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}')"
    page, card, text, soft = (browser.run(f"return {style.format(name)}") for name in ("page", "card", "text", "soft"))
    assert contrast(text, page) > 7 and contrast(text, card) > 7 and contrast(soft, card) > 4.5
    assert (luminance(page) < 0.1) is (scheme == "dark")


def luminance(color: str) -> float:
    parts = [int(color.strip()[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
