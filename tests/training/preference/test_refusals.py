"""What preference objectives do not go with, as far as the configuration alone does not show it."""

from __future__ import annotations

import pytest

from sparseft.commands import bench
from sparseft.compose.run_config import compose
from sparseft.errors import UserError


def test_bench_measures_imitation() -> None:
    with pytest.raises(UserError, match=r"objective=dpo: what is measured is imitation"):
        bench.run(compose("bench", ["objective=dpo", "hardware=cpu"]))
