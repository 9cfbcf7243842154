"""Killed anywhere (SIGKILL) and started again with trainer.resume=auto, a run ends with the adapter it would have had.

`make test-slow` kills a hundred times, and forty times one of two processes; a handful here. The seed of each case
stands in its name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseft.training.checkpoints import CHECKPOINTS, check, checkpoint_steps
from support import killing
from support.running import METHODS, files, metrics, on, summary, write_data

FACTS = "step epoch loss eval_loss learning_rate grad_norm".split()
VARIANTS = {
    "sylva": [*METHODS["sylva"], "method.num_samples=4", "method.num_partition=1"],
    "s2ft": [*METHODS["s2ft"], "method.importance=gradient", "method.num_samples=4", "method.reselect_steps=2"],
    "losia": ["method=losia", "sparsity=0.9", "method.reselect_steps=2"],
    "lora": [*METHODS["lora"], "method.dropout=0.1"],
    "full": METHODS["full"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """`made(method)`: the words of a run, its uninterrupted folder, and how many changes of files it makes."""
    world = tmp_path_factory.mktemp("kill")
    data = write_data(world)["json"]
    done: dict[str, tuple[list[str], Path, int]] = {}

    def make(method: str) -> tuple[list[str], Path, int]:
        if method not in done:
            words = [
                "train",
                *on(model_folder(), data),
                *VARIANTS[method],
                "trainer.max_steps=5",
                "trainer.save_steps=1",
            ]
            words += ["trainer.logging_steps=1", "trainer.eval_steps=2", "trainer.keep_best=true"]
            words += ["dataset.max_examples=9", "output_dir=run", "trainer.resume=auto"]
            folder = world / method
            folder.mkdir()
            ended = killing.run(words, folder)
            assert ended.code == 0 and ended.operations > 50, ended.err
            done[method] = (words, folder / "run", ended.operations)
        return done[method]

    return make


def kill_and_continue(seed: int, method: str, uninterrupted: Any, folder: Path, kills: int) -> int:
    """Kills a run again and again at random places, continues it, and compares the end; returns the kills."""
    words, whole, operations = uninterrupted(method)
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        # A run that was killed late has little left to do, and may come to its end.
        where = {"operation": draw.randint(1, operations), "half": draw.random() < 0.5}
        ended = killing.run(words, folder, **where)
        assert ended.code in (-9, 0), ended.err
        if ended.code == 0:
            break
        killed += 1
        for step in checkpoint_steps(folder / "run" / CHECKPOINTS):
            check(folder / "run" / CHECKPOINTS / f"checkpoint-{step}")  # whole, or not there at all
    ended = killing.run(words, folder)
    assert ended.code == 0 and "Traceback" not in ended.err and "damaged" not in ended.err, ended.err
    same(folder / "run", whole)
    return killed


def same(run: Path, whole: Path) -> None:
    names = {name for name in files(whole / "adapter") if name.endswith(".safetensors")}
    assert names
    for name in names:
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), name
    assert [{k: line.get(k) for k in FACTS} for line in metrics(run)] == [
        {k: line.get(k) for k in FACTS} for line in metrics(whole)
    ]
    for key in ("steps", "tokens", "train_loss", "eval_loss_before", "eval_loss_after", "best_step"):
        assert summary(run).get(key) == summary(whole).get(key), key
    assert files(run) == files(whole)  # nothing that a killed process left aside
    cache = run.parent / ".cache" / "sparseft" / "selections"
    assert not cache.exists() or not [path for path in cache.iterdir() if path.suffix == ".partial"]


@pytest.mark.parametrize(
    ("seed", "method"),
    [(2, "s2ft"), (3, "losia"), pytest.param(1, "sylva", marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_as_the_uninterrupted_one(seed: int, method: str, uninterrupted: Any, tmp_path: Path) -> None:
    assert kill_and_continue(seed, method, uninterrupted, tmp_path, 2) >= 1


@pytest.mark.slow
def test_a_hundred_kills(uninterrupted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kill(seed: int, method: str, folder: Path) -> int:
        return kill_and_continue(1000 + seed, method, uninterrupted, folder, 4)

    shown = kill_many(100, list(VARIANTS), kill, tmp_path)
    with capsys.disabled():
        print(f"\n{shown}: each ended with the adapter of the uninterrupted run")


def kill_many(least: int, names: list[str], kill: Callable[[int, str, Path], int], tmp_path: Path) -> str:
    """Kills `least` times or more, in runs that take turns with the names; says how often."""
    seed, killed = 0, dict.fromkeys(names, 0)
    while sum(killed.values()) < least:
        seed += 1
        name = names[seed % len(names)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        killed[name] += kill(seed, name, folder)
    shown = ", ".join(f"{name} {count}" for name, count in killed.items())
    return f"{sum(killed.values())} kills of {seed} runs ({shown})"


# ---- one of two processes ----

TOGETHER = {
    "preprocess": [*VARIANTS["sylva"], "method.num_samples=6"],
    "lora": VARIANTS["lora"],
    "s2ft": [*VARIANTS["s2ft"], "trainer.keep_best=true"],
    "zero 2": [*METHODS["sylva"], "method.num_samples=4", "hardware.zero_stage=2", "trainer.keep_best=true"],
    "zero 3": [*METHODS["s2ft"], "hardware.zero_stage=3"],
    "fsdp": [*METHODS["full"], "hardware.fsdp=true", "trainer.keep_best=true"],
}


def words_together(name: str, data: Path, model: Path) -> list[str]:
    words = [*on(model, data), *TOGETHER[name], "dataset.max_examples=9", "hardware.num_processes=2"]
    if name == "preprocess":
        return ["preprocess", *words]
    words += ["trainer.max_steps=4", "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.eval_steps=2"]
    return ["train", *words, "output_dir=run", "trainer.resume=auto"]


@pytest.fixture(scope="module")
def uninterrupted_together(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """`made(name)`: the words, the working directory of two processes that were not killed, and the changes of files
    that each of them makes."""
    world = tmp_path_factory.mktemp("together")
    data = write_data(world)["json"]
    done: dict[str, tuple[list[str], Path, list[int]]] = {}

    def make(name: str) -> tuple[list[str], Path, list[int]]:
        if name not in done:
            words = words_together(name, data, model_folder())
            folder = world / name.replace(" ", "-")
            folder.mkdir()
            both = killing.run_together(words, folder)
            assert [ended.code for ended in both] == [0, 0], both
            assert both[0].operations > 5 and both[1].operations > 2, both
            done[name] = (words, folder, [ended.operations for ended in both])
        return done[name]

    return make


def kill_one_and_continue(seed: int, name: str, uninterrupted: Any, folder: Path, kills: int) -> int:
    """Kills one of two processes again and again, continues, and compares the end; returns the kills."""
    words, whole, operations = uninterrupted(name)
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        victim = draw.randint(0, 1)
        # The first kill is in the first half, so that it always is one: how many changes there are varies a little.
        most = operations[victim] if killed else operations[victim] // 2
        where = {"operation": draw.randint(1, most), "half": draw.random() < 0.5}
        both = killing.run_together(words, folder, victim=victim, **where)
        assert both[victim].code in (-9, 0), both
        if both[victim].code == 0:
            break
        killed += 1
        for step in checkpoint_steps(folder / "run" / CHECKPOINTS):
            check(folder / "run" / CHECKPOINTS / f"checkpoint-{step}")
    for ended in killing.run_together(words, folder):
        assert ended.code == 0 and "Traceback" not in ended.err and "damaged" not in ended.err, ended.err
    if name != "preprocess":
        same(folder / "run", whole / "run")
    left, right = (place / ".cache" / "sparseft" / "selections" for place in (folder, whole))
    assert left.exists() == right.exists()
    if left.exists():  # where a process was killed while it wrote one, the hidden folder that it wrote aside stays
        found = {file for file in files(left) if not file.startswith(".")}
        assert found == files(right)
        for file in found:
            assert (left / file).read_bytes() == (right / file).read_bytes(), file
    return killed


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        (3, "preprocess"),
        (4, "lora"),
        *(pytest.param(5, n, marks=pytest.mark.slow) for n in ("s2ft", "zero 2", "zero 3", "fsdp")),
    ],
)
def test_one_of_two_processes_is_killed(seed: int, name: str, uninterrupted_together: Any, tmp_path: Path) -> None:
    assert kill_one_and_continue(seed, name, uninterrupted_together, tmp_path, 2) >= 1


@pytest.mark.slow
def test_one_of_two_processes_is_killed_forty_times(
    uninterrupted_together: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(seed: int, name: str, folder: Path) -> int:
        return kill_one_and_continue(2000 + seed, name, uninterrupted_together, folder, 3)

    shown = kill_many(40, list(TOGETHER), kill, tmp_path)
    with capsys.disabled():
        print(f"\nOf one of two processes, {shown}: each ended as the uninterrupted one")
