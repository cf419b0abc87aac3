"""A chat template cannot hang or fill the memory of what renders it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from conftest import TINY_MODEL
from forgebook.data import chat_template, render_limits
from forgebook.data.render_limits import within_limits
from forgebook.errors import ModelError
from forgebook.models.tokenizer import load_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(t='ab') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t|length }}"
)
REPEATED = "{{ ('ab' * 9999999999)|length }}"
PADDED = "{{ 'ab'|center(9999999999) }}"
GROWING = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '%020000d' % 1 }}{% endfor %}{% endfor %}"
LONG = "{% for a in range(99999) %}{{ '%02000d' % 1 }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "ran for 0.3 s"),
        (DOUBLING, "memory"),
        (REPEATED, "memory"),
        (PADDED, "memory"),
        (LONG, "wrote 199,998,000 characters"),
    ],
)
def test_a_template_without_end_is_stopped_and_named(template, reason, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.3 if template == LOOP else 5.0)
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.chat_template = template
    started = time.process_time()  # the limit's own clock: what else the machine does counts for nothing
    with pytest.raises(ModelError, match=rf"the chat template of '.*tiny_model' .*{reason}"):
        chat_template.render([{"role": "user", "content": "hi"}], tokenizer)
    assert time.process_time() - started < 10
    tokenizer.chat_template = "{{ messages[0].content * 1000 }}"  # the limits are gone
    assert len(chat_template.render([{"role": "user", "content": "hi"}], tokenizer)) == 2000


def test_errors_of_a_template_pass_and_other_threads_render_too():
    with pytest.raises(KeyError):
        within_limits(lambda: {}["key"], "name")
    texts = []
    thread = threading.Thread(target=lambda: texts.append(within_limits(lambda: "text", "name")))
    thread.start()
    thread.join()
    assert texts == ["text"] == [within_limits(lambda: "text", "name")]


@pytest.mark.parametrize(
    ("template", "seconds", "reason"),
    [(LOOP, 0.2, "may loop without end"), (GROWING, 5.0, "memory"), (DOUBLING, 5.0, "memory")],
    ids=["loop", "growing", "doubling"],
)
def test_a_template_without_end_is_stopped_in_other_threads_too(template, seconds, reason, monkeypatch):
    """A thread has no limit on memory of its own: what the process holds is bounded all the same."""
    monkeypatch.setattr(render_limits, "SECONDS", seconds)
    monkeypatch.setattr(render_limits, "MEMORY", 1 << 26)
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.chat_template = template
    most, ended = [psutil.Process().memory_info().rss], threading.Event()

    def measure():
        while not ended.wait(0.02):
            most.append(psutil.Process().memory_info().rss)

    def render():
        return chat_template.render([{"role": "user", "content": "hi"}], tokenizer)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(measure)
        try:
            with pytest.raises(ModelError, match=reason):
                pool.submit(render).result(timeout=60)
        finally:
            ended.set()
        tokenizer.chat_template = "{{ messages[0].content }}"
        assert pool.submit(render).result(timeout=60) == "hi"
    assert max(most) - most[0] < 4 << 30
