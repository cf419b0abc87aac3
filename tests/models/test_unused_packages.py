"""Packages that are out of sight for a block."""

import functools
import importlib.util
import sys

import pytest

from forgebook.models.unused_packages import without_unused


def test_a_package_is_out_of_sight_in_the_block_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ZeroDivisionError), without_unused("colorsys"):
        assert importlib.util.find_spec("colorsys") is None
        with pytest.raises(ImportError):
            import colorsys
        1 / 0  # noqa: B018
    import colorsys

    with without_unused("colorsys"):
        assert sys.modules["colorsys"] is colorsys


def test_a_library_looks_again_in_the_block_and_after_it(monkeypatch):
    @functools.cache
    def is_there() -> bool:
        return importlib.util.find_spec("colorsys") is not None

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    found = [is_there()]
    with without_unused("colorsys", is_there):
        found.append(is_there())
    assert [*found, is_there()] == [True, False, True]
