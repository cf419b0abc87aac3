"""A save that ends while training continues, and what it raises."""

import threading

import pytest

from forgebook.training.background_save import BackgroundSave


def test_it_ends_later_and_raises_its_error_once():
    saving, may_end, done = BackgroundSave(), threading.Event(), []

    def write():
        assert may_end.wait(30)
        done.append(1)

    saving.wait()  # nothing to wait for
    saving.start(write)
    assert not done
    may_end.set()
    saving.start(write)  # after the first
    assert done[0] == 1
    saving.wait()
    assert done == [1, 1]

    def fail():
        raise OSError(28, "No space left on device")

    saving.start(fail)
    with pytest.raises(OSError, match="No space left"):
        saving.wait()
    saving.wait()
