"""Settings of methods by position, as programs pass them."""

from __future__ import annotations

import dataclasses

import pytest

from sparseft.methods import METHODS, get_method


@pytest.mark.parametrize("name", METHODS)
def test_settings_that_all_methods_share_take_no_position(name: str) -> None:
    first = [field.name for field in dataclasses.fields(get_method(name)) if not field.kw_only][:2]
    assert first == (["dtype"] if get_method(name).trains_all else ["sparsity", "scope"])
