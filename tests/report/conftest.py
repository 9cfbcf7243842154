"""Here pages are what is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.pages import real_pages


@pytest.fixture(scope="package", autouse=True)
def pages() -> Iterator[None]:
    with real_pages():
        yield
