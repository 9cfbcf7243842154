"""The time left, against runs whose end is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseft import pace
from sparseft.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def run(
    clock: list[float], steps: range, seconds: Callable[[int], float], pauses: dict[int, float] | None = None
) -> tuple[dict[int, float | None], dict[int, float]]:
    """What was said to be left after each step, and what was."""
    judged, at = Pace(steps[-1], steps[0] - 1), {}
    said = {}
    for step in steps:
        clock[0] += seconds(step)
        judged.update(step)
        if pauses and step in pauses:
            judged.pause()
            clock[0] += pauses[step]
            judged.go_on()
        said[step], at[step] = judged.left(), clock[0]
    return said, {step: at[steps[-1]] - at[step] for step in steps}


def test_a_slow_first_step_does_not_count(clock: list[float]) -> None:
    said, left = run(clock, range(1, 101), lambda step: 90.0 if step == 1 else 2.0)
    assert said[1] is None
    for step in range(2, 101):
        assert said[step] == pytest.approx(left[step], rel=0.01), step


@pytest.mark.parametrize("every", [5, 10, 30])
def test_pauses_are_no_work_and_come_again(every: int, clock: list[float]) -> None:
    pauses = dict.fromkeys(range(every, 101, every), 40.0)
    said, left = run(clock, range(1, 101), lambda step: 1.0, pauses)
    for step in range(every, 101):
        assert said[step] == pytest.approx(left[step], abs=0.01), step
    assert said[every - 1] == pytest.approx(100 - every + 1)  # before the first one nothing is known of them


def test_what_was_done_before_a_resumption_took_no_time(clock: list[float]) -> None:
    said, left = run(clock, range(901, 1001), lambda step: 3.0, {950: 30.0, 1000: 30.0})
    assert said[910] == pytest.approx(270.0)
    assert said[960] == pytest.approx(left[960], abs=0.01)


def test_a_change_of_speed_is_followed(clock: list[float]) -> None:
    said, left = run(clock, range(1, 1001), lambda step: 5.0 if step < 200 else 1.0)
    assert said[500] == pytest.approx(left[500], rel=0.05)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_units_that_come_in_batches(one_by_one: bool, clock: list[float]) -> None:
    judged = Pace(80)
    for batch in (1, 2, 3):
        clock[0] += 10.0
        for unit in range(20 * (batch - 1) + 1 if one_by_one else 20 * batch, 20 * batch + 1):
            clock[0] += 1e-5
            judged.update(unit)
        assert judged.left() == (None if batch == 1 else pytest.approx(10.0 * (4 - batch), rel=0.01))
    said = []
    for _ in range(3):
        clock[0] += 4.0
        said.append(judged.left())
    assert said == pytest.approx([6.0, 2.0, 0.0], abs=0.01)


def test_little_is_kept(clock: list[float]) -> None:
    judged = Pace(10**6)
    for step in range(1, 20_001):
        clock[0] += 0.1
        judged.update(step)
    assert len(judged.marks) < 200
    assert judged.left() == pytest.approx(0.1 * (10**6 - 20_000), rel=0.01)


def test_an_unknown_total_has_no_end(clock: list[float]) -> None:
    judged = Pace(None)
    judged.update(1)
    judged.update(2)
    assert judged.left() is None
