"""What preference objectives do not go with, as far as the configuration alone does not show it."""

from __future__ import annotations

import pytest

from sparseft.commands import bench
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.training import checks


def test_a_launchers_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("train", ["objective=dpo", "hardware=cpu"])
    checks.check_objective(config)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="runs in one process so far"):
        checks.check_objective(config)


def test_bench_measures_imitation() -> None:
    with pytest.raises(UserError, match=r"objective=dpo: what is measured is imitation"):
        bench.run(compose("bench", ["objective=dpo", "hardware=cpu"]))
