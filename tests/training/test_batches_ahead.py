"""Batches made ahead: in order, a few at a time, and the same as those made when they are taken."""

import os
import threading
import time

import pytest

from forgebook.data.image_batches import MOST_AHEAD
from forgebook.training import batches_ahead
from forgebook.training.batches_ahead import in_order, threads_for


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_their_parts(threads):
    def make(number):
        time.sleep(0.02 * (number % 3 == 0))  # some take longer than those after them
        return number, threading.current_thread() is threading.main_thread()

    made = list(in_order(make, range(10), threads))
    assert made == [(number, not threads) for number in range(10)]


def test_a_few_are_made_ahead_at_the_same_time_and_no_more():
    begun, meet = [], threading.Barrier(3, timeout=20)

    def make(number):
        begun.append(number)
        if number < 3:
            meet.wait()  # breaks unless three are made at once
        return number

    made = in_order(make, iter(range(100)), 3)
    assert next(made) == 0
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2, 3]  # the one that was taken, and three ahead
    made.close()
    assert len(begun) == 4


def test_an_error_comes_in_its_turn():
    def make(number):
        if number == 2:
            raise ValueError("the third")
        return number

    made = in_order(make, range(9), 4)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(made)


def test_workers_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(batches_ahead, "cores", lambda: 8)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "1")
    assert threads_for(on_gpu=True) == MOST_AHEAD and threads_for(on_gpu=False) == 1
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "4")
    assert threads_for(on_gpu=True) == 1
