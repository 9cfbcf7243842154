"""How `sparseft bench kernels` tells the device's time from the host's, with a device that is played."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparseft.bench import kernels
from sparseft.bench.kernels import LONGEST_SPIN, SPIN, Timer


class Device:
    """A GPU whose clock runs in cycles of its own: it works through what is queued while the host goes on.

    A call costs the host `host` cycles and the device `work`. Events say when the device has come to them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captures: bool = True) -> None:
        self.host = self.device = 0.0  # cycles until which each is busy
        self.acts: list[str] = []
        self.captures, self.capturing = captures, False
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    def zero_(self) -> None:
        self.acts.append("caches overwritten")
        self.queue(80_000)

    def sleep(self, cycles: int) -> None:
        self.acts.append(f"busy {cycles}")
        self.queue(cycles)

    def queue(self, work: float) -> None:
        self.device = max(self.device, self.host) + work

    def call(self, name: str, host: float, work: float, waits: bool = False) -> Callable[[], None]:
        def run() -> None:
            if self.capturing and waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.host += host
            if self.capturing:
                self.captured.append((name, work))
                return
            self.acts.append(name)
            if waits:
                self.host = max(self.host, self.device)
            self.queue(work)

        return run

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        if not self.captures:
            raise RuntimeError("no graphs here")
        self.capturing, self.captured = True, []
        try:
            yield
        finally:
            self.capturing = False
        graph.parts = self.captured


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.parts = device, []

    def replay(self) -> None:
        self.device.host += 20_000
        for name, work in self.parts:
            self.device.acts.append(f"replayed {name}")
            self.device.queue(work)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.device.queue(0)
        self.at = self.device.device

    def query(self) -> bool:
        return self.device.host >= self.at

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e6  # milliseconds, at 1e9 cycles a second


def timer_of(device: Any) -> Timer:
    timer = Timer(torch.device("cpu"))
    timer._cache = device
    return timer


def test_the_device_is_busy_while_the_host_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    seconds = timer_of(device).once(device.call("kernel", host=100_000, work=8_000))
    assert seconds == pytest.approx(8e-6)  # not the host's 100
    assert device.acts == ["caches overwritten", f"busy {SPIN}", "kernel"]


def test_a_host_slower_than_that_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timer = timer_of(device)
    slow = device.call("kernel", host=5 * SPIN, work=8_000)
    assert timer.once(slow) == pytest.approx(8e-6)
    spins = [f"busy {factor * SPIN}" for factor in (1, 2, 4, 8)]
    assert [act for act in device.acts if act.startswith("busy")] == spins
    device.acts.clear()
    assert timer.once(slow) == pytest.approx(8e-6) and device.acts[1:] == [spins[-1], "kernel"]  # it has learnt


def test_a_call_that_waits_for_the_device_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timer = timer_of(device)
    with pytest.raises(RuntimeError, match="waits for the device"):
        timer.medians([device.call("waiting", host=10_000, work=8_000, waits=True)], repeats=2)
    assert timer.timed == "launches" and SPIN < timer.spin <= 2 * LONGEST_SPIN


@pytest.mark.parametrize("captures", [True, False])
def test_graphs_are_replayed_where_all_can_be_captured(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, captures)
    timer = timer_of(device)
    calls = [device.call("kernel", host=100_000, work=8_000), device.call("dense", host=10_000, work=90_000)]
    assert timer.medians(calls, repeats=3) == [pytest.approx(8e-6), pytest.approx(9e-5)]
    assert timer.timed == ("graph" if captures else "launches")
    named = [act for act in device.acts if "busy" not in act and "caches" not in act]
    prefix = "replayed " if captures else ""
    assert named == ["kernel", "dense", *[f"{prefix}kernel", f"{prefix}dense"] * 5]  # called once ahead


def test_the_two_of_a_row_are_timed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be captured is called, and so is the other."""
    device = Device(monkeypatch)
    timer = timer_of(device)
    monkeypatch.setattr(
        kernels, "replay_of", lambda call, plain=kernels.replay_of: plain(call) if call is first else None
    )
    first = device.call("kernel", host=10_000, work=8_000)
    timer.medians([first, device.call("dense", host=10_000, work=90_000)], repeats=1)
    assert timer.timed == "launches" and not [act for act in device.acts if "replayed" in act]


@pytest.mark.gpu
def test_on_a_gpu_a_replayed_copy_takes_the_time_of_its_bytes() -> None:
    """What captures and events really do: twice the bytes take twice the time, from a graph as by launches."""
    timer = Timer(torch.device("cuda"))
    small, large = (torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (2**26, 2**27))
    a, b = (torch.empty_like(one) for one in (small, large))
    one, two = timer.medians([lambda: a.copy_(small), lambda: b.copy_(large)], 10)
    assert timer.timed == "graph" and 1.6 < two / one < 2.4
    assert timer.once(lambda: b.copy_(large)) == pytest.approx(two, rel=0.3)
