"""The engine by itself: what it streams, when an answer ends, and what one bad request does to the others."""

import threading

import pytest

from conftest import TINY_MODEL, uneven_rows
from forgebook.data.masking import encode_prompt
from forgebook.inference.engine import MAX_WAITING, Engine, GenerationRequest, Job, QueueFull
from forgebook.inference.generate import complete
from forgebook.inference.sampling import TokenSampling

CONVERSATIONS = [row["messages"][:-1] for row in uneven_rows(6)]


@pytest.fixture(scope="module")
def engine():
    running = Engine({"tiny": TINY_MODEL}, dtype="float32", batch_size=4).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(messages, tokenizer) for messages in CONVERSATIONS]


class Stream:
    """Collect the pieces of one answer."""

    def __init__(self):
        self.pieces: list[str] = []
        self.ended = threading.Event()

    def __call__(self, piece: str | None) -> None:
        self.ended.set() if piece is None else self.pieces.append(piece)


def ask(engine, **values) -> tuple[Job, Stream]:
    stream = Stream()
    return engine.submit(GenerationRequest("tiny", **{"max_new_tokens": 12, **values}), stream), stream


def answer(engine, **values) -> tuple[Job, Stream]:
    job, stream = ask(engine, **values)
    assert stream.ended.wait(60)
    return job, stream


def test_answers_are_those_of_complete_whatever_shares_their_batch(engine, prompts):
    loaded = engine.models["tiny"].loaded
    expected = complete(loaded.model, loaded.tokenizer, CONVERSATIONS, max_new_tokens=12)
    asked = [ask(engine, input_ids=ids) for ids in prompts]
    assert all(stream.ended.wait(60) for _, stream in asked)
    assert [job.text for job, _ in asked] == expected and len(set(expected)) > 1
    assert ["".join(stream.pieces) for _, stream in asked] == expected
    assert {job.finish for job, _ in asked} <= {"stop", "length"} and not engine.jobs


def test_a_stop_string_ends_an_answer_and_no_part_of_it_is_sent(engine, prompts):
    whole, _ = answer(engine, input_ids=prompts[0])
    stop = whole.text[5:9]
    job, stream = answer(engine, input_ids=prompts[0], stop=("never", stop))
    assert job.text == "".join(stream.pieces) == whole.text[: whole.text.index(stop)] and job.finish == "stop"
    assert len(job.ids) < len(whole.ids)


def test_the_token_limit_is_each_answers_own(engine, prompts):
    asked = [ask(engine, input_ids=prompts[0], max_new_tokens=count) for count in (1, 7, 3)]
    assert all(stream.ended.wait(60) for _, stream in asked)
    assert [(len(job.ids), job.finish) for job, _ in asked] == [(count, "length") for count in (1, 7, 3)]


def test_a_cancelled_answer_ends_and_the_engine_answers_on(engine, prompts):
    job, stream = ask(engine, input_ids=prompts[0], max_new_tokens=900, sampling=TokenSampling(2.0, seed=3))
    while not stream.pieces:
        assert not stream.ended.wait(0.005)
    job.cancel()
    assert stream.ended.wait(60) and job.finish == "cancelled" and len(job.ids) < 900
    assert answer(engine, input_ids=prompts[1])[0].text


def test_a_request_that_fails_ends_with_an_error_and_no_other_does(engine, prompts, capfd):
    job, _ = answer(engine, input_ids=[10**6])  # no such token
    assert job.finish == "error" and "generating with tiny failed: IndexError" in capfd.readouterr().out
    assert answer(engine, input_ids=prompts[0])[0].finish in ("stop", "length")


def test_characters_of_several_tokens_are_sent_whole(engine, tokenizer):
    text = "é😀 日本 done"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text.split())
    stream = Stream()
    job = Job(GenerationRequest("tiny", [], max_new_tokens=100), engine.models["tiny"], stream)
    assert not any(job.add_token(token) for token in ids) and job.add_token(next(iter(engine.models["tiny"].stop_ids)))
    assert "".join(stream.pieces) == job.text == text and not any("\ufffd" in piece for piece in stream.pieces)
    assert job.ids == ids and job.finish == "stop" and stream.ended.is_set()


def test_an_incomplete_character_at_the_end_is_the_replacement_character(engine, tokenizer):
    ids = tokenizer.encode("a😀", add_special_tokens=False)
    stream = Stream()
    job = Job(GenerationRequest("tiny", [], max_new_tokens=len(ids) - 1), engine.models["tiny"], stream)
    assert [job.add_token(token) for token in ids[:-1]][-1] and job.finish == "length"
    assert job.text == "".join(stream.pieces) == tokenizer.decode(ids[:-1])


def test_requests_wait_up_to_a_bound_and_a_stopped_engine_drops_them(prompts):
    idle = Engine({"tiny": TINY_MODEL}, dtype="float32")  # not started: nothing leaves its queue
    jobs = [ask(idle, input_ids=prompts[0]) for _ in range(MAX_WAITING)]
    with pytest.raises(QueueFull):
        ask(idle, input_ids=prompts[0])
    assert len(idle.jobs) == MAX_WAITING
    for job, _ in jobs:
        job.cancel()
    idle.start().stop()
    assert all(stream.ended.is_set() and job.finish == "cancelled" for job, stream in jobs)
    with pytest.raises(QueueFull):
        ask(idle, input_ids=prompts[0])


def test_the_context_of_a_model_is_that_of_its_config(engine):
    assert engine.models["tiny"].context == 1024 and engine.models["tiny"].stop_ids == {2}
