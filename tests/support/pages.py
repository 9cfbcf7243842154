"""A run's page, which takes longer than a tiny run's steps: left blank where nobody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from sparseft.commands import report
from sparseft.report.page import build_report


def _blank(runs: Sequence[Path], out: Path) -> Path:
    out.write_text("")
    return out


def blank_pages() -> AbstractContextManager[Any]:
    """Inside, the runs of this process leave an empty report.html."""
    return mock.patch.object(report, "build_report", _blank)


def real_pages() -> AbstractContextManager[Any]:
    """Inside, they leave it as users get it."""
    return mock.patch.object(report, "build_report", build_report)
