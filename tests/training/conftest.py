"""Runs of training here leave their report without its drawings: half of a tiny run's time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparseft.report.charts import Drawing
from support.pages import real_pages


@pytest.fixture(scope="module", autouse=True)
def no_drawings() -> Iterator[None]:
    """The page is made of the run's files as ever, and its charts of their values, which matplotlib does not lay out.
    tests/report draws what files may hold, and tests/commands what runs leave."""
    with real_pages(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "finish", lambda self, title: setattr(self, "svg", ""))
        yield
