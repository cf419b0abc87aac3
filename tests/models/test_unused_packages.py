"""Packages that are out of sight for a block."""

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
