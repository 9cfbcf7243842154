"""What `bench.targets` may say and how it is judged; the turns that contenders take."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from sparseft.bench import output, targets
from sparseft.bench.contenders import owns_weights
from sparseft.bench.timing import failed_row, orders, spread, take_turns
from sparseft.compose.run_config import compose
from sparseft.config import BenchConfig
from sparseft.errors import UserError
from support.places import ROOT

NAMES = ["floor", "s2ft", "lora rank=16", "full"]
STEPS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("step_*.yaml"))


def row(step: float, peak: int | None = None, saved: int | None = None, trainable: int = 0) -> dict:
    return {"step_seconds": step, "peak_memory_bytes": peak, "saved_bytes": saved, "trainable_parameters": trainable}


# ---- the grammar ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s2ft / floor <= 1.00", ("step", "s2ft", "floor", 1.0)),
        ("s2ft/floor<=1", ("step", "s2ft", "floor", 1.0)),
        ("step s2ft / lora rank=16 <= 0.5", ("step", "s2ft", "lora rank=16", 0.5)),
        ("saved s2ft / lora rank=16 <= 0.70", ("saved", "s2ft", "lora rank=16", 0.7)),
        ("peak lora rank=16 / full <= 0.5", ("peak", "lora rank=16", "full", 0.5)),
        ("peak s2ft <= bound", ("peak", "s2ft", None, None)),
        ("peak s2ft <= 17.5 GB", ("peak", "s2ft", None, 17.5e9)),
        ("saved lora rank=16 <= 2MiB", ("saved", "lora rank=16", None, 2 * 2**20)),
        ("step s2ft <= 20 ms", ("step", "s2ft", None, 0.02)),
    ],
)
def test_targets_are_read(text: str, expected: tuple) -> None:
    target = targets.parse(text, NAMES)
    assert (target.quantity, target.one, target.other, target.limit) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s2ft / floor < 1", ["is no target", "peak one <= bound"]),
        ("s2ft / floor <= 1 <= 2", ["is no target"]),
        ("s2ft / floor <= -1", ["is no target"]),
        ("s2ft / <= 1", ["is no target"]),
        ("peak <= bound", ["is no target"]),
        ("peak s2ft <= bond", ["is no target", "bound"]),
        ("s2tf / floor <= 1", ["no contender 's2tf'", "'s2ft'"]),
        ("lora rank=8 / floor <= 1", ["no contender 'lora rank=8'", "'lora rank=16'"]),
        ("peek s2ft <= bound", ["unknown quantity 'peek'", "'peak'"]),
        ("peek s2ft / full <= 1", ["unknown quantity 'peek'", "'peak'"]),
        ("saved s2ft <= bound", ["one of a contender's peak"]),
        ("peak s2ft / floor <= bound", ["expected 'peak s2ft <= bound'"]),
        ("peak s2ft <= 17.5", ["no unit", "GB, GiB, MB, MiB"]),
        ("peak s2ft <= 17.5 Gb", ["unknown unit 'Gb'", "GB, GiB"]),
        ("s2ft <= 2 GB", ["unknown unit 'GB'", "s, ms"]),
        ("s2ft / floor <= 1 GB", ["a ratio has no unit"]),
    ],
)
def test_what_is_no_target(text: str, parts: list[str]) -> None:
    with pytest.raises(UserError, match=re.escape(f"bench.targets: '{text}'")) as caught:
        targets.parse(text, NAMES)
    for part in parts:
        assert part in str(caught.value)


def test_targets_of_the_hosts_part() -> None:
    """Its quantities are others, and the first one is meant where none is named."""
    texts = ["s2ft / floor <= 1.06", "reference s2ft / floor <= 1.35", "update s2ft <= 0.5 ms", "update full <= 1 s"]
    read = [targets.parse(text, NAMES, targets.HOST) for text in texts]
    assert [(t.quantity, t.other, t.limit) for t in read] == [
        ("passes", "floor", 1.06),
        ("reference", "floor", 1.35),
        ("update", None, 0.0005),
        ("update", None, 1.0),
    ]
    methods = {
        "floor": {"passes_seconds": 2.0, "reference_seconds": 2.0},
        "s2ft": {"passes_seconds": 2.1, "reference_seconds": 2.8, "update_seconds": 0.0004},
        "full": {"missing": "no room"},
    }
    judged = targets.judge(texts, methods | {"lora rank=16": {}}, 0, targets.HOST)
    assert [entry["measured"] for entry in judged] == [pytest.approx(1.05), pytest.approx(1.4), 0.0004, None]
    assert [entry["met"] for entry in judged] == [True, False, True, None]
    assert "measured 0.400 ms, limit 0.500 ms" in targets.lines(judged)[2] and "no room" in targets.lines(judged)[3]
    assert targets.failure({"methods": methods, "targets": judged}) == (
        "1 of 4 targets missed: reference s2ft / floor <= 1.35. 1 of 4 targets not measured: update full <= 1 s."
    )
    for text in ("peak s2ft <= bound", "peak s2ft / floor <= 1"):
        with pytest.raises(UserError, match="unknown quantity 'peak': expected passes, reference, update"):
            targets.parse(text, NAMES, targets.HOST)
    with pytest.raises(UserError, match="one of a contender's peak"):
        targets.parse("update s2ft <= bound", NAMES, targets.HOST)
    with pytest.raises(UserError, match="unknown quantity 'update': expected step, peak, saved"):
        targets.parse("update s2ft <= 1 ms", NAMES)


@pytest.mark.parametrize("name", STEPS)
def test_experiments_state_the_targets_of_memory(name: str) -> None:
    """Every target can be read, every sparse method has the bound and the ratio to LoRA."""
    bench = compose("bench", [f"experiment={name}"]).bench
    stated = [targets.parse(text, bench.methods) for text in bench.targets]
    assert len({(t.quantity, t.one, t.other, t.limit) for t in stated}) == len(stated)
    for method, saved in (("s2ft", 0.70), ("sylva", 0.85)):
        entries = [entry for entry in bench.methods if entry.split()[0] == method]
        mine = [{(t.quantity, t.other, t.limit) for t in stated if t.one == entry} for entry in entries]
        assert not mine or any({("peak", None, None), ("saved", "lora", saved)} <= one for one in mine)
    peaks = {"step_llama2_7b": 17.5e9, "step_llama2_13b": 65e9}
    absolute = {t.limit for t in stated if t.quantity == "peak" and t.limit is not None}
    assert absolute == ({peaks[name]} if name in peaks else set())


# ---- judging ----


def test_the_bound_counted_by_hand() -> None:
    """Weights 1,000 bytes, the floor's activations 400, three weights trained: 1,000 + 412 + 20 x 3 = 1,472 bytes."""
    methods = {"floor": row(1.0, 1400), "a": row(1.0, 1472, trainable=3), "b": row(1.0, 1473, trainable=3)}
    one, other = targets.judge(["peak a <= bound", "peak b <= bound"], methods, weights_bytes=1000)
    assert one == {
        "target": "peak a <= bound",
        "measured": 1472,
        "limit": pytest.approx(1472),
        "unit": "bytes",
        "met": True,
    }
    assert (other["measured"], other["met"]) == (1473, False)


def test_ratios_and_amounts() -> None:
    methods = {"floor": row(0.010, 10, 20), "a": row(0.012, 3 * 2**20, 14), "b": row(0.001, 5)}
    methods["c"] = {"missing": "peft is not installed"}
    texts = ["a / floor <= 1.2", "a / floor <= 1.19", "saved a / floor <= 0.7", "peak a <= 3 MiB", "peak a <= 3 MB",
             "a <= 12 ms", "saved b / floor <= 1", "a / c <= 1"]  # fmt: skip
    judged = targets.judge(texts, methods, weights_bytes=0)
    assert [entry["met"] for entry in judged] == [True, False, True, True, False, True, None, None]
    assert [entry["unit"] for entry in judged[2:6]] == ["ratio", "bytes", "bytes", "seconds"]
    assert judged[3]["measured"] == judged[3]["limit"] == 3 * 2**20 and judged[6]["measured"] is None
    assert targets.lines(judged) == [
        "met: a / floor <= 1.2 (measured 1.200)",
        "MISSED: a / floor <= 1.19 (measured 1.200)",
        "met: saved a / floor <= 0.7 (measured 0.700)",
        "met: peak a <= 3 MiB (measured 3.00 MiB, limit 3.00 MiB)",
        "MISSED: peak a <= 3 MB (measured 3.15 MB, limit 3.00 MB)",
        "met: a <= 12 ms (measured 12.00 ms, limit 12.00 ms)",
        "NOT MEASURED: saved b / floor <= 1 (b: saved is not counted in this way)",
        "NOT MEASURED: a / c <= 1 (c: peft is not installed)",
    ]


def test_figures_have_the_digits_that_tell_them_apart() -> None:
    methods = {"floor": row(0.010, 10**9, 10), "a": row(0.0100004, 17_500_400_000, 8_000, trainable=3)}
    texts = ["  saved   a <= 0.001 GB", "peak a <= 17.5 GB", "a / floor <= 1.0", "peak a<=bound"]
    lines = targets.lines(targets.judge(texts, methods, weights_bytes=10**9))
    assert lines[:3] == [
        "met: saved a <= 0.001 GB (measured 0.00000800 GB, limit 0.00100000 GB)",
        "MISSED: peak a <= 17.5 GB (measured 17.5004 GB, limit 17.5000 GB)",
        "MISSED: a / floor <= 1.0 (measured 1.00004)",
    ]
    assert lines[3].startswith("MISSED: peak a<=bound (") and lines[4].startswith("bound: ") and len(lines) == 5


# ---- turns ----


@pytest.mark.parametrize("count", range(1, 12))
def test_quantiles_leave_out_as_many_times_below_as_above(count: int) -> None:
    found = spread("seconds", [float(at) for at in range(count)])
    assert found["seconds_p20"] + found["seconds_p80"] == count - 1 == 2 * found["seconds"]
    assert found["seconds_p20"] == (0 if count < 6 else 1 if count < 11 else 2)


@pytest.mark.parametrize("count", range(1, 10))
def test_orders_are_balanced(count: int) -> None:
    cycle = orders(count)
    assert len(cycle) == (count if count % 2 == 0 else 2 * count)
    assert all(sorted(order) == list(range(count)) for order in cycle)
    times = len(cycle) // count
    for place in range(count):
        assert Counter(order[place] for order in cycle) == dict.fromkeys(range(count), times)
    after = Counter(pair for order in cycle for pair in itertools.pairwise(order))
    assert after == dict.fromkeys(itertools.permutations(range(count), 2), times)
    if count > 2:
        assert all(one[-1] != following[0] for one, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def test_contenders_take_balanced_turns() -> None:
    """Ten timed rounds of five are one whole cycle; the rounds before, not timed, end another."""
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abcde"}
    seconds = take_turns(calls, BenchConfig(steps=10, warmup_steps=2), torch.device("cpu"))
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcde", 10)
    rounds = ["".join(called[at : at + 5]) for at in range(0, 60, 5)]
    assert rounds == ["".join("abcde"[place] for place in order) for order in [*orders(5)[-2:], *orders(5)]]


@pytest.mark.parametrize("name", STEPS)
def test_experiments_of_many_methods_take_whole_cycles(name: str) -> None:
    """Of those that share the weights: one that has its own takes turns with the floor alone, in either order."""
    bench = compose("bench", [f"experiment={name}"]).bench
    sharing = [entry for entry in bench.methods if not owns_weights(entry)]
    assert bench.steps % len(orders(len(sharing))) == bench.steps % 2 == 0


def test_one_that_fails_takes_no_further_turns() -> None:
    called: list[str] = []
    told: list[tuple[str, str]] = []

    def breaks() -> None:
        called.append("b")
        if called.count("b") == 3:
            raise MemoryError("full")

    calls = {"a": lambda: called.append("a"), "b": breaks, "c": lambda: called.append("c")}
    settings, device = BenchConfig(steps=5, warmup_steps=1), torch.device("cpu")
    seconds = take_turns(calls, settings, device, lambda name, error: told.append((name, repr(error))))
    assert {name: len(times) for name, times in seconds.items()} == {"a": 5, "c": 5}
    assert called.count("b") == 3 and told == [("b", "MemoryError('full')")]
    called.clear()
    with pytest.raises(MemoryError):  # nobody to be told
        take_turns(calls, settings, device)


def test_a_failure_names_the_line_below_the_package() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        take_turns({"a": lambda: 1 // 0}, BenchConfig(steps=1, warmup_steps=0), torch.device("cpu"))
    found = failed_row(caught.value)
    assert found["failed"].startswith("ZeroDivisionError: ")
    assert re.fullmatch(r"sparseft/bench/timing\.py:\d+", found["where"])
    assert failed_row(ValueError()) == {"failed": "ValueError"}


# ---- what is printed ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\nmodel\t: 3\nmodel name\t: another\n", "Some CPU @ 2 GHz"),
        ("processor\t: 0\nCPU part\t: 0xd0c\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
    ],
)
def test_the_processors_name(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(output, "CPUINFO", tmp_path / "cpuinfo")
    assert output.cpu_name() == expected


def test_a_gpu_is_named_with_its_host() -> None:
    environment = {"cpu": "Some CPU", "cores": 1, "threads": 8}
    assert output.measured_on({"device": "cpu", "environment": environment}) == "Some CPU (1 core, 8 threads)"
    named = output.measured_on({"device": "Some GPU", "environment": environment})
    assert named == "Some GPU (host: Some CPU, 1 core, 8 threads)"
