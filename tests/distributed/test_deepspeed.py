"""What reaches into DeepSpeed and accelerate: there in the installed versions, and missed with a sentence."""

from __future__ import annotations

import types

import accelerate
import pytest

from sparseft.distributed import deepspeed as ours
from sparseft.errors import RunError


def test_what_is_not_there_is_said_with_the_version() -> None:
    with pytest.raises(RunError, match=rf"^accelerate {accelerate.__version__} has no PartialState\._gone, which"):
        ours._inside(accelerate.PartialState, "_gone", "accelerate")
    with pytest.raises(RunError, match=r"^accelerate .* has no accelerate\.utils\._gone, which"):
        ours._inside(accelerate.utils, "_gone", "accelerate")


def test_an_accelerate_that_asks_in_another_way_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(accelerate.utils.other, "is_deepspeed_available")
    ours.import_only_to_train()
    assert not hasattr(accelerate.utils.other, "is_deepspeed_available")


def test_gradients_are_judged_at_stages_that_would_not_look() -> None:
    def engine(stage: int, **attributes: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            zero_optimization_stage=lambda: stage, optimizer=types.SimpleNamespace(**attributes)
        )

    ours.judge_gradients(known := engine(2, check_grad_overflow=False))
    assert known.optimizer.check_grad_overflow is True
    ours.judge_gradients(engine(3))
    with pytest.raises(RunError, match="^deepspeed .* has no SimpleNamespace.check_grad_overflow"):
        ours.judge_gradients(engine(1))
