"""An interrupted calibration goes on where it was, and several ranks come to one process's selection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseft import SylvaConfig, compute_selection
from sparseft.importance import calibration as resuming
from sparseft.importance import scores
from sparseft.importance.calibration import Watch
from sparseft.importance.kfac import FactorSettings
from sparseft.models.spec import ModelSpec
from support.places import ROOT
from support.running import on, sparseft, write_data

COUNT = 9


def samples(count: int = COUNT) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, 96, (1, 5 + (3 * i) % 7), generator=generator) for i in range(count)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def scored(model: Any, importance: str, **options: Any) -> dict[str, Tensor]:
    return scored_with_facts(model, importance, **options).scores


def scored_with_facts(model: Any, importance: str, **options: Any) -> scores.Scored:
    budget = SylvaConfig(sparsity=0.9, block_size=8).budget(ModelSpec.of(model))
    watch = Watch(*(options.pop(name, None) for name in ("progress", "scoring", "resume")))
    options = {"seed": 0, "batches": samples()} | options
    return scores.compute_scores(model, budget.candidates, importance, watch=watch, **options)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def stop_after(count: int, seen: list[int]) -> Callable[[int], None]:
    def progress(done: int) -> None:
        seen.append(done)
        if done >= count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "TOKENS_TOGETHER", 24)


@pytest.mark.parametrize("importance", ["activation", "product", "gradient", "fisher", "sylva"])
def test_it_goes_on_with_the_next_samples(make_model: Callable[..., Any], importance: str, tmp_path: Path) -> None:
    model, folder = make_model("qwen2"), tmp_path / "key.partial"
    whole = scored(model, importance)
    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        scored(model, importance, progress=stop_after(3, first), resume=folder)
    assert resuming.saved_samples(folder) == first[-1] and 3 <= first[-1] < COUNT
    second: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        scored(model, importance, progress=stop_after(6, second), resume=folder)
    third: list[int] = []
    assert equal(scored(model, importance, progress=third.append, resume=folder), whole)
    passes = first + second + third
    assert passes == sorted(set(passes)) and passes[-1] == COUNT  # no sample went twice


def test_it_goes_on_with_the_next_linear(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, folder = make_model("llama"), tmp_path / "key.partial"
    whole = scored_with_facts(model, "sylva")

    def stop(done: int, _count: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(model, "sylva", scoring=stop, resume=folder)
    seen: list[tuple[int, int]] = []
    fail = pytest.fail
    found = scored_with_facts(
        model, "sylva", progress=lambda _: fail("a sample went twice"), resume=folder,
        scoring=lambda *at: seen.append(at),
    )  # fmt: skip
    assert equal(found.scores, whole.scores) and found.facts == whole.facts
    assert seen[0][0] > 3 and seen[-1] == (14, 14)


def test_it_saves_now_and_then_and_survives_what_is_unusable(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = make_model("llama"), tmp_path / "key.partial"
    whole = scored(model, "sylva")
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "SAVE_COST", 0.0)
    assert equal(scored(model, "sylva", resume=folder), whole)
    assert {path.name for path in folder.iterdir()} == {"statistics-0of1.safetensors", "scores-0of1.safetensors"}
    assert not equal(scored(model, "sylva", resume=folder, factors=FactorSettings(damping=0.5)), whole)
    assert "belongs to other settings" in capsys.readouterr().err
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert resuming.saved_samples(folder) == 0
    assert equal(scored(model, "sylva", resume=folder), whole)
    assert "cannot be used, so calibration starts anew" in capsys.readouterr().err
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert equal(scored(model, "sylva", resume=in_the_way / "partial"), whole)
    assert capsys.readouterr().err.count("cannot be resumed") == 1


# -- processes that are ended -----------------------------------------------------------------------------------------

SLOW = textwrap.dedent(
    """
    import sys, time
    import sparseft.importance.calibration as collecting, sparseft.importance.calibration as resuming
    import sparseft.importance.scores as scores
    resuming.SAVE_SECONDS = resuming.SAVE_COST = 0.0
    scores.TOKENS_TOGETHER = 1  # one sample at a time
    plain = collecting.keep
    def slow(*args):
        plain(*args)
        print("saved", args[-1][1], flush=True, file=sys.stderr)
        time.sleep(0.3)
    collecting.keep = slow
    from sparseft.cli.app import main
    sys.exit(main(sys.argv[1:]))
    """
)


def preprocess(folder: Path, model: Path) -> list[str]:
    return [
        "preprocess", *on(model, write_data(folder)["json"]), "method=sylva", "sparsity=0.9",
        "method.block_size=8", "method.num_samples=8",
    ]  # fmt: skip


def check_that_it_goes_on(folder: Path, words: list[str]) -> None:
    """From what a command that ended after the third sample has left, to what one that never ended would choose."""
    (partial,) = (folder / ".cache/sparseft/selections").iterdir()
    assert partial.suffix == ".partial" and 3 <= resuming.saved_samples(partial) < 8
    done = sparseft(folder, *words, "--json")
    assert "calibration: goes on after" in done.err
    resumed = Path(folder / done.json["selection"])
    assert not partial.exists()
    fresh = sparseft(folder, *words, "--json", "cache_dir=fresh").json
    for name in ("selection.json", "selection.safetensors"):
        assert (resumed / name).read_bytes() == (folder / fresh["selection"] / name).read_bytes()


INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.slow) for each in INTERRUPTS)]
)
def test_a_process_goes_on_after_a_signal(
    tmp_path: Path, model_folder: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = preprocess(tmp_path, model_folder("llama"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines = []
    assert child.stderr is not None
    for line in child.stderr:
        lines.append(line)
        if line.startswith("saved 3"):
            child.send_signal(number)
            break
    lines += child.stderr.readlines()
    assert child.wait(60) == (-9 if number == signal.SIGKILL else 130), "".join(lines)
    if number != signal.SIGKILL:
        assert any(f"{number.name}: what is done is kept in" in line for line in lines)
    monkeypatch.setattr(scores, "TOKENS_TOGETHER", 1)  # the state counts in groups: here they are the child's
    check_that_it_goes_on(tmp_path, words)


@pytest.mark.parametrize("number", INTERRUPTS)
def test_preprocess_keeps_what_is_done_at_a_signal(
    tmp_path: Path, model_folder: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, plain = preprocess(tmp_path, model_folder("llama")), resuming.keep

    def keep(*args: Any) -> None:
        plain(*args)
        if args[-1][1] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(scores, "TOKENS_TOGETHER", 1)
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "keep", keep)
        patch.setattr(resuming, "SAVE_SECONDS", 0.0)
        patch.setattr(resuming, "SAVE_COST", 0.0)
        done = sparseft(tmp_path, *words, code=130)
    assert f"{number.name}: what is done is kept in" in done.err
    check_that_it_goes_on(tmp_path, words)


BY_LAYER = textwrap.dedent(
    """
    import sys, time
    import torch.distributed as dist
    import sparseft.selection.compute as computing
    from sparseft.importance.layerwise import Walk
    plain, score, back = Walk._tell, computing.compute_scores, Walk._back
    computing.compute_scores = lambda *args, **options: score(*args, **options | {"by_layer": True})
    def tell(self, watch):
        print("left", self.left, flush=True, file=sys.stderr)
        time.sleep(float(sys.argv[1]))
        plain(self, watch)
    Walk._tell = tell
    from sparseft.cli.app import main
    dist.init_process_group("gloo")  # for all commands
    codes = []
    for cache in sys.argv[2].split(","):
        print("cache", cache, flush=True, file=sys.stderr)
        codes.append(main([*sys.argv[3:], f"cache_dir={cache}"]))
    sys.exit(max(codes))
    """
)


def two(folder: Path, words: list[str], caches: str, seconds: Sequence[float]) -> list[subprocess.Popen[str]]:
    """Two ranks of a command, as torchrun starts them, that wait so long after each pass of a layer; with one cache
    after the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", BY_LAYER, str(wait), caches, *words], cwd=folder, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, wait in enumerate(seconds)
    ]  # fmt: skip


def ended(children: list[subprocess.Popen[str]], seconds: float = 240) -> list[str]:
    try:
        errors = [child.communicate(timeout=seconds)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return errors


@pytest.mark.parametrize(
    ("signalled", "waits"),
    [
        ((0, 1), (0.3, 0.3)),
        pytest.param((0, 1), (0.0, 1.5), marks=pytest.mark.slow),
        pytest.param((1,), (0.0, 0.3), marks=pytest.mark.slow),
    ],
    ids=["both", "one-is-far-ahead", "one-alone"],
)
def test_two_ranks_go_on_below_the_layers_that_are_done(
    tmp_path: Path, model_folder: Any, signalled: Sequence[int], waits: Sequence[float]
) -> None:
    """SIGINT once the first layer is done: all ranks end with that layer, also where a signal reaches one only, or the
    other waits for its sums already."""
    words = preprocess(tmp_path, model_folder("llama"))
    children, read = two(tmp_path, words, ".cache/sparseft", waits), []
    slower = children[1]
    assert slower.stderr is not None
    for line in slower.stderr:
        read.append(line)
        if line.startswith("left 1"):
            for rank in signalled:
                children[rank].send_signal(signal.SIGINT)
            break
    errors = ended(children)
    assert [child.returncode for child in children] == [130, 130], "".join([*read, *errors])
    assert all("Traceback" not in error for error in errors)
    (partial,) = (tmp_path / ".cache/sparseft/selections").iterdir()
    assert {path.name for path in partial.iterdir()} == {f"layers-{rank}of2.safetensors" for rank in (0, 1)}
    children = two(tmp_path, words, ".cache/sparseft,fresh", (0.0, 0.0))
    errors = ended(children)
    assert [child.returncode for child in children] == [0, 0], "".join(errors)
    resumed, fresh = errors[0].split("cache fresh\n")
    assert "goes on below decoder layer 1" in resumed and "left 2" not in resumed
    assert "goes on below" not in fresh and "left 2" in fresh
    (found,) = (tmp_path / ".cache/sparseft/selections").iterdir()
    for name in ("selection.json", "selection.safetensors"):
        assert (found / name).read_bytes() == (tmp_path / "fresh/selections" / found.name / name).read_bytes()


# -- ranks ------------------------------------------------------------------------------------------------------------


RANKED = [("sylva", COUNT), ("sylva", 1), ("fisher", COUNT)]


def worker(rank: int, world: int, port: int, folder: str) -> None:
    """One gloo process: its selections and its scores, written to files."""
    import torch.distributed as dist

    from support.models import build_model

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for importance, count in RANKED:
            model, case = build_model("llama"), Path(folder) / f"{importance}-{count}"
            config = SylvaConfig(sparsity=0.9, block_size=8, importance=importance)
            seen: list[int] = []
            partial = case.with_suffix(".partial")
            selection = compute_selection(model, config, samples(count), progress=seen.append, resume=partial)
            found = scored(model, importance, batches=samples(count))
            assert equal(scored(model, importance, batches=samples(count), by_layer=True), found)
            torch.save((selection.modules, found, seen), f"{case}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks have found of each case."""
    folder = tmp_path_factory.mktemp("ranked")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.spawn(worker, (2, port, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 300
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return folder


@pytest.mark.parametrize(("importance", "count"), RANKED)
def test_two_ranks_choose_what_one_process_chooses(
    make_model: Callable[..., Any], ranked: Path, importance: str, count: int
) -> None:
    model = make_model("llama")
    alone = scored(model, importance, batches=samples(count))
    config = SylvaConfig(sparsity=0.9, block_size=8, importance=importance)
    wanted = compute_selection(model, config, samples(count)).modules
    both = [torch.load(ranked / f"{importance}-{count}-{rank}.pt") for rank in range(2)]
    for modules, found, _ in both:
        assert equal(found, both[0][1])
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=2e-3, atol=1e-5 * float(value.max()))
        for name, patterns in wanted.items():
            assert torch.equal(modules[name]["blocks"], patterns["blocks"]), name
    assert len(both[0][2]) >= 1 and (count > 1) == bool(both[1][2])


# -- threads ----------------------------------------------------------------------------------------------------------


def test_linears_are_scored_by_as_many_threads_as_torch_has(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, threads = make_model("llama"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = scored(model, "sylva")
        torch.set_num_threads(2)
        found = scored(model, "sylva")
        assert torch.get_num_threads() == 2
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6 * float(value.max()))

        def stop(done: int, _count: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            scored(model, "sylva", scoring=stop, resume=tmp_path / "partial")
        assert torch.get_num_threads() == 2
        assert equal(scored(model, "sylva", resume=tmp_path / "partial"), found)
    finally:
        torch.set_num_threads(threads)
