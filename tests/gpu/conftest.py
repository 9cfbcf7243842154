"""Tests that run on the device and, so that they are known to be right, on the CPU too."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """`cpu`, and `cuda` where there is one."""
    return request.param
