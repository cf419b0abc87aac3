"""Calls that do not return are given up."""

import io
import threading

import pytest

from forgebook.runs import time_limit
from forgebook.runs.time_limit import Limited, within_limit


class Store:
    """Files that can be opened; reading waits until it is released, as from a server that does not answer."""

    def __init__(self):
        self.released, self.closed, self.returned = threading.Event(), 0, 0

    def open_input_stream(self, path):
        return self

    def read(self):
        self.released.wait(10)
        self.returned += 1
        return b"x"

    def close(self):
        self.closed += 1


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(time_limit, "GIVE_UP_SECONDS", 0.1)
    store = Store()
    yield store
    store.released.set()


def test_a_result_and_an_error_are_those_of_the_call():
    assert within_limit(lambda: 5) == 5
    with pytest.raises(FileNotFoundError, match="no file"):
        within_limit(lambda: (_ for _ in ()).throw(FileNotFoundError("no file")))


def test_a_call_that_does_not_return_is_given_up(store):
    with pytest.raises(TimeoutError, match=r"timed out after 0.1 s"):
        within_limit(store.read)
    assert not store.released.is_set() and store.returned == 0  # it was given up, not waited for


def test_every_method_of_an_opened_file_is_limited_and_it_is_not_closed_after_that(store):
    with pytest.raises(TimeoutError), Limited(store).open_input_stream("name") as source:
        source.read()
    assert store.closed == 0
    store.released.set()
    with Limited(store).open_input_stream("name") as source:
        assert source.read() == b"x"
    assert store.closed == 1


def test_what_is_read_is_not_changed():
    assert Limited(io.BytesIO(b"abc")).read(2) == b"ab"
