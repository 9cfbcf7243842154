"""Live patching: the sampler's weights are the trainer's after every step, and nothing that went wrong is applied."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseft
from sparseft.errors import RunError, UserError
from sparseft.export import holders
from sparseft.export.live.messages import STEP, checksum
from sparseft.layers import sparse_layers
from sparseft.layers.inactive import swap
from support import adapted
from support.places import ROOT, SUPPORT
from support.ranks import run_ranks
from support.running import gone

WORKER = SUPPORT / "live_worker.py"


def train_a_little(model: Any, seed: int) -> None:
    """Other deltas, as an optimizer's step leaves them; the part of an edge block outside its weight stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            for pattern in layer.patterns.values():
                pattern.delta += torch.randn(pattern.delta.shape, generator=generator) * 0.1 * (pattern.delta != 0)


def assert_same(plain: Any, attached: Any) -> None:
    """Bit for bit, what a plain model or a state dict has of the attached one's."""
    state = attached.state_dict()
    for name, tensor in (plain if isinstance(plain, dict) else plain.state_dict()).items():
        assert torch.equal(tensor, state[name]), name


class Pair:
    """A trainer's model and a sampler's on one base."""

    def __init__(self, folder: Path, kind: str = "llama", method: str = "fused") -> None:
        self.base = adapted.base(kind, folder / "base", torch.bfloat16)
        self.model = adapted.attached(kind, method, adapted.load(self.base))
        self.plain = adapted.load(self.base)
        self.live = folder / "live"
        self.sender = sparseft.PatchSender(self.model, self.live, timeout=5)
        self.receiver = sparseft.PatchReceiver(self.plain, self.live, timeout=5)

    def step(self, seed: int = 0) -> int:
        train_a_little(self.model, seed)
        return self.sender.send()

    @property
    def files(self) -> list[Path]:
        return sorted(self.live.glob("*.step"))


@pytest.mark.parametrize("kind", adapted.BASES)
@pytest.mark.parametrize("method", ["rows", "fused"])
def test_every_step_is_the_trainers(kind: str, method: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, kind, method)
    for step in range(1, 5):
        assert pair.step(step) == step
        assert pair.receiver.receive() == pair.receiver.step == step
        assert_same(pair.plain, pair.model)
    pair.sender.close()
    assert pair.receiver.receive() is None
    assert list(pair.receiver) == []
    assert not pair.files


@pytest.mark.parametrize("dictionary", [False, True])
def test_what_says_where_entries_lie_is_on_their_device_before_the_first_step(
    dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no step uploads it again. Entries in their own order need no places among those asked for."""
    monkeypatch.setattr(holders, "_writable", lambda _, tensor: tensor)
    model = adapted.load(adapted.base("llama", tmp_path / "base", torch.bfloat16)).to("meta")
    state, name = model.state_dict(), "model.layers.0.mlp.up_proj.weight"
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    holder = holders.holder_of(dict(state) if dictionary else model, shapes)
    in_order, mixed = (holder.slots(name, torch.tensor(index))[0] for index in ([1, 4, 9], [4, 9, 1]))
    assert in_order.index.device.type == mixed.index.device.type == "meta"
    assert in_order.which is None
    assert (mixed.which is None) if dictionary else (mixed.which.device.type == "meta")


def test_a_step_is_two_bytes_an_entry(tmp_path: Path) -> None:
    """In bf16; the first one brings the indices, once."""
    pair = Pair(tmp_path, method="blocks")
    entries = sum(layer.trainable_entries for layer in sparse_layers(pair.model).values())
    sizes = []
    for step in range(3):
        pair.step(step)
        sizes.append(pair.files[0].stat().st_size)
        pair.receiver.receive()
    assert sizes[1] == sizes[2] == 64 + 2 * entries + -2 * entries % 8
    assert sizes[0] > 64 + 6 * entries


def test_a_permuted_layout_arrives_in_the_checkpoints_order(tmp_path: Path) -> None:
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    config = sparseft.S2FTConfig(sparsity=0.8, roles=["up", "down"], importance="random", layout="permuted")
    model = sparseft.attach(adapted.load(base), config)
    assert any(layer.is_permuted for layer in sparse_layers(model).values())
    plain = adapted.load(base)
    sender, receiver = sparseft.PatchSender(model, tmp_path / "live"), sparseft.PatchReceiver(plain, tmp_path / "live")
    for _ in range(3):
        with torch.no_grad():
            for delta in sparseft.trainable_parameters(model).values():
                delta += torch.randn(delta.shape) * 0.1
        sender.send()
        receiver.receive()
        assert_same(plain, model)


def test_reselection_sends_indices_anew(tmp_path: Path) -> None:
    pair = Pair(tmp_path, method="rows")
    (layer,) = (layer for layer in sparse_layers(pair.model).values() if layer.patterns)
    pair.step()
    pair.receiver.receive()
    for step, rows in enumerate(([7, 5, 1], [0, 5, 2]), 2):
        swap(layer, "rows", torch.tensor(rows))
        with torch.no_grad():
            layer.delta.add_(0.2)
        assert pair.step() == pair.receiver.receive() == step
        assert_same(pair.plain, pair.model)
    pair.step()
    assert pair.files[0].stat().st_size == 64 + 2 * 3 * 48  # what waits is not sent again
    pair.receiver.receive()
    assert_same(pair.plain, pair.model)


def test_another_adapter_and_the_base(tmp_path: Path) -> None:
    """Entries that no longer train get the base's values back."""
    pair = Pair(tmp_path, method="rows")
    other = adapted.adapter("llama", "columns", pair.base, tmp_path / "other", seed=3)
    pair.step()
    pair.receiver.receive()
    sparseft.load_adapter(pair.model, other, "other")
    pair.sender.send()
    pair.receiver.receive()
    assert_same(pair.plain, pair.model)
    sparseft.set_adapter(pair.model, "default")
    pair.sender.send()
    pair.receiver.receive()
    assert_same(pair.plain, pair.model)
    sparseft.set_adapter(pair.model, None)
    pair.sender.send()
    pair.receiver.receive()
    assert_same(pair.plain, adapted.load(pair.base))


def test_it_begins_with_the_base(tmp_path: Path) -> None:
    pair = Pair(tmp_path, method="rows")
    sparseft.set_adapter(pair.model, None)
    assert pair.sender.send() == 1 and pair.receiver.receive() == 1
    assert_same(pair.plain, adapted.load(pair.base))
    sparseft.set_adapter(pair.model, "default")
    assert pair.step() == 2 and pair.receiver.receive() == 2
    assert_same(pair.plain, pair.model)


def test_what_began_and_was_not_sent_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is switched to, sending fails, and the one before is active again."""
    pair = Pair(tmp_path, method="rows")
    other = adapted.adapter("llama", "columns", pair.base, tmp_path / "other", seed=3)
    pair.step()
    pair.receiver.receive()
    sparseft.load_adapter(pair.model, other, "other")
    with monkeypatch.context() as patch:
        patch.setattr(pair.sender.transport, "send", lambda *_: exec("raise RunError('full')", globals()))
        with pytest.raises(RunError, match="full"):
            pair.sender.send()
    sparseft.set_adapter(pair.model, "default")
    pair.step()
    pair.receiver.receive()
    assert_same(pair.plain, pair.model)


def test_a_state_dict_and_a_function(tmp_path: Path) -> None:
    """Both in the checkpoint's coordinates: experts one by one."""
    from safetensors.torch import load_file

    base = adapted.base("mixtral", tmp_path / "base", torch.bfloat16)
    model = adapted.attached("mixtral", "fused", adapted.load(base))
    first, second = (load_file(base / "model.safetensors") for _ in range(2))
    calls: list[str] = []

    def update(name: str, shape: Any, dtype: torch.dtype, indices: torch.Tensor, values: torch.Tensor) -> None:
        assert (tuple(second[name].shape), second[name].dtype, values.dtype) == (shape, dtype, dtype)
        assert indices.dtype == torch.int32 and torch.equal(indices, indices.unique())
        second[name].view(-1)[indices.long()] = values
        calls.append(name)

    for place, target in (("one", first), ("two", update)):
        sender = sparseft.PatchSender(model, tmp_path / place)
        receiver = sparseft.PatchReceiver(target, tmp_path / place)
        for step in range(2):
            train_a_little(model, step)
            sender.send()
            receiver.receive()
    assert any(".w1." in name for name in calls)
    for tensors in (second, first):  # `second` followed to the end
        if tensors is second:
            sparseft.merge(model).save_pretrained(tmp_path / "merged")
            wanted = load_file(tmp_path / "merged/model.safetensors")
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    assert first.keys() == second.keys()


def test_a_receiver_on_another_base_is_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.step()
    for other, said in (
        (adapted.build("llama", torch.bfloat16, seed=4), "has another base"),
        (adapted.build("qwen2", torch.bfloat16), "the sender's model is another"),
        (adapted.build("gpt2", torch.bfloat16), "the sender's model is another"),
        (adapted.load(pair.base, torch.float32), "is float32, the sender's is bfloat16: load it in bfloat16"),
        (adapted.attached("llama", "rows", adapted.load(pair.base)), "has an adapter attached"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(UserError, match=said):
            sparseft.PatchReceiver(other, pair.live).receive()
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert pair.receiver.receive() == 1  # the one that fits still finds it


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    base = adapted.base("llama", tmp_path / "base")
    with pytest.raises(UserError, match="the model has no adapter"):
        sparseft.PatchSender(adapted.load(base), tmp_path / "live")
    with pytest.raises(UserError, match="sends the entries of a sparse adapter: the model has a peft adapter"):
        sparseft.PatchSender(adapted.attached("llama", "lora", adapted.load(base)), tmp_path / "live")
    with pytest.raises(UserError, match=r"needs torch\.distributed\.init_process_group"):
        sparseft.PatchPeer(1)
    with pytest.raises(UserError, match="expected a model, a state dict or a function"):
        sparseft.PatchReceiver(3, tmp_path)  # type: ignore[arg-type]


# -- steps that went wrong --------------------------------------------------------------------------------------------


def lost(pair: Pair, old: bytes) -> str:
    pair.files[0].unlink()
    return r"step 2 was lost: step 3 came; the weights are those of step 1\."


def swapped(pair: Pair, old: bytes) -> str:
    first, second = pair.files
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return "step 2 was lost: step 3 came"


def repeated(pair: Pair, old: bytes) -> str:
    pair.files[0].write_bytes(old)
    return r"step 1 came again, or late; the weights are those of step 1\."


def one_bit(pair: Pair, old: bytes) -> str:
    data = bytearray(pair.files[0].read_bytes())
    data[random.Random(1).randrange(64, len(data))] ^= 16
    pair.files[0].write_bytes(data)
    return "step 2 arrived damaged"


def header(pair: Pair, old: bytes) -> str:
    data = bytearray(pair.files[0].read_bytes())
    data[24] ^= 4  # its number
    pair.files[0].write_bytes(data)
    return "its header is not what was sent"


def cut(pair: Pair, old: bytes) -> str:
    pair.files[0].write_bytes(pair.files[0].read_bytes()[:-8])
    return "step 2 arrived damaged"


def nearly_nothing(pair: Pair, old: bytes) -> str:
    pair.files[0].write_bytes(b"sft")
    return "is truncated"


def another_sender(pair: Pair, old: bytes) -> str:
    for file in pair.files:
        file.unlink()
    sparseft.PatchSender(pair.model, pair.live, timeout=5).send()
    return "another sender has begun"


@pytest.mark.parametrize("wrong", [lost, swapped, repeated, one_bit, header, cut, nearly_nothing, another_sender])
def test_it_is_refused_and_the_weights_stay(wrong: Any, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.step(1)
    old = pair.files[0].read_bytes()
    pair.receiver.receive()
    before = {name: tensor.clone() for name, tensor in pair.plain.state_dict().items()}
    pair.step(2)
    pair.step(3)
    said = wrong(pair, old)
    with pytest.raises(RunError, match=said):
        pair.receiver.receive()
    assert pair.receiver.step == 1
    assert_same(before, pair.plain)


def test_a_step_of_other_entries_is_refused(tmp_path: Path) -> None:
    """A message that is whole, and of the right number, but made for indices that were never announced."""
    pair = Pair(tmp_path)
    pair.step(1)
    pair.receiver.receive()
    pair.sender.plan += 1
    pair.step(2)
    with pytest.raises(RunError, match="is of other entries than were announced"):
        pair.receiver.receive()


def test_a_receiver_that_comes_late_and_one_that_waits_in_vain(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with pytest.raises(RunError, match=r"no step came for 0\.1 s: is the sender there"):
        pair.receiver.receive(timeout=0.1)
    pair.step(1)
    pair.receiver.receive()
    pair.step(2)
    with pytest.raises(RunError, match="the sender has begun before this receiver: it is at step 2"):
        sparseft.PatchReceiver(adapted.load(pair.base), pair.live).receive()
    with pytest.raises(UserError, match="steps of another sender lie there"):
        sparseft.PatchSender(pair.model, pair.live)


def test_a_sender_waits_for_its_receiver(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.sender.timeout = 0.2
    pair.step(1)
    pair.step(2)
    with pytest.raises(RunError, match=r"nobody has read 000000000001\.step for 0\.2 s"):
        pair.step(3)
    assert [pair.receiver.receive(), pair.receiver.receive()] == [1, 2]
    assert pair.step(4) == 3  # the one that was not taken was not counted
    assert pair.receiver.receive() == 3
    assert_same(pair.plain, pair.model)
    pair.sender.close()
    with pytest.raises(UserError, match="the sender is closed"):
        pair.sender.send()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """A step that cannot be written was not sent: it is sent once the folder is there again."""
    pair = Pair(tmp_path)
    pair.step(1)
    pair.receiver.receive()
    pair.live.rename(tmp_path / "away")
    with pytest.raises(RunError, match=r"000000000002\.step cannot be written: No such file or directory"):
        pair.step(2)
    (tmp_path / "away").rename(pair.live)
    assert pair.step(3) == pair.receiver.receive() == 2
    assert_same(pair.plain, pair.model)


def test_a_checksum_sees_every_change() -> None:
    body = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = checksum(body)
    numbers = body.view(torch.int64)
    expected = sum((2 * i + 1) * number for i, number in enumerate(numbers.tolist())) % 2**64
    assert whole % 2**64 == expected
    for place in range(0, 4096, 97):
        other = body.clone()
        other[place] ^= 1 << place % 8
        assert checksum(other) != whole
    assert checksum(numbers[torch.randperm(512, generator=torch.Generator().manual_seed(1))].view(torch.uint8)) != whole
    assert STEP == 2


# -- two processes ----------------------------------------------------------------------------------------------------


def job(tmp_path: Path, kind: str, steps: int, live: Path | None) -> Path:
    base = adapted.base(kind, tmp_path / "base", torch.bfloat16)
    facts = {"base": str(base), "kind": kind, "live": str(live) if live else None, "out": str(tmp_path), "steps": steps}
    (tmp_path / "job.json").write_text(json.dumps(facts))
    return tmp_path / "job.json"


PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def start(file: Path, role: str) -> subprocess.Popen[bytes]:
    log = open(file.parent / f"{role}.log", "wb")
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(file), role],
        env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )


def noted(tmp_path: Path, role: str) -> list[tuple[int, str]]:
    file = tmp_path / f"{role}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]")]


def test_two_processes_over_a_folder(tmp_path: Path) -> None:
    file = job(tmp_path, "mixtral", 12, tmp_path / "live")
    both = [start(file, "sample"), start(file, "train")]
    for process, role in zip(both, ("sample", "train"), strict=True):
        assert process.wait(300) == 0, (tmp_path / f"{role}.log").read_text()[-3000:]
    assert noted(tmp_path, "sampler") == noted(tmp_path, "trainer")
    assert len({digest for _, digest in noted(tmp_path, "sampler")}) == 12


def test_a_sender_that_is_killed_leaves_the_last_whole_step(tmp_path: Path) -> None:
    """At a random moment, half-way through writing a step for one."""
    file = job(tmp_path, "llama", 100_000, tmp_path / "live")
    sampler, trainer = start(file, "sample"), start(file, "train")
    end = time.monotonic() + 200
    while len(noted(tmp_path, "sampler")) < 3 and time.monotonic() < end and trainer.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait(20) == -signal.SIGKILL, (tmp_path / "train.log").read_text()[-3000:]
    (tmp_path / "live/.partial-0123-000000999999.step").write_bytes(b"half of it")
    time.sleep(1)
    while list((tmp_path / "live").glob("0*.step")) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(sampler.pid, signal.SIGKILL)
    assert sampler.wait(20) == -signal.SIGKILL, (tmp_path / "sample.log").read_text()[-3000:]
    assert gone([sampler.pid, trainer.pid])
    sent, received = noted(tmp_path, "trainer"), noted(tmp_path, "sampler")
    assert len(received) >= 3
    assert received == sent[: len(received)]
    assert len(sent) - len(received) <= 1  # the one that was being sent


def test_two_processes_over_torch_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    file = job(tmp_path, "gpt2", 6, None)
    run_ranks(tmp_path, json.loads(file.read_text()), worker=WORKER)
    assert noted(tmp_path, "sampler") == noted(tmp_path, "trainer")
    assert len(noted(tmp_path, "sampler")) == 6
