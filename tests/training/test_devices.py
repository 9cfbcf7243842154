"""What devices and their switches make of a run: one process on a machine with several GPUs, TF32 under a compiler."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator
from sparseft.training.arguments import training_arguments
from sparseft.training.distributed_trainer import LEFT_OUT
from sparseft.training.trainer import Trainer
from support.places import ROOT, SUPPORT
from support.training import attached, examples, trainer_of

CPU = torch.device("cpu")


def arguments_on(device: str, **settings: Any) -> transformers.TrainingArguments:
    return training_arguments(
        TrainerConfig(batch_size=3, learning_rate=1e-3, **settings), HardwareConfig(), seed=0,
        device=torch.device(device), total_steps=1,
    )  # fmt: skip


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there are four, and transformers and accelerate believe it; nothing can be put there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("set_device", "empty_cache", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def on_the_cpu(self: Any) -> torch.device:
        assert self._setup_devices.type == ("cpu" if self.use_cpu else "cuda")
        return CPU

    monkeypatch.setattr(transformers.TrainingArguments, "device", property(on_the_cpu))


def test_the_machine_is_one_where_transformers_would_copy_the_model(four_gpus: None, tmp_path: Path) -> None:
    assert transformers.TrainingArguments(output_dir=str(tmp_path)).n_gpu == 4


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora", "full"])
def test_one_process_that_sees_several_gpus_uses_one(
    four_gpus: None, method: str, make_model: Any, tmp_path: Path
) -> None:
    arguments = arguments_on("cuda")
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.eval_batch_size == 3
    assert arguments.world_size == 1 and arguments.parallel_mode.value == "not_parallel"
    trainer = Trainer(
        attached(make_model("llama"), method), arguments, run=tmp_path, train_dataset=examples(8),
        data_collator=Collator(0), processing_class=None,
    )  # fmt: skip
    for training in (True, False):
        wrapped = trainer._wrap_model(trainer.model, training=training)
        assert not any(isinstance(module, nn.DataParallel) for module in wrapped.modules())
    assert trainer.get_train_dataloader().total_batch_size == 3


def test_a_run_on_the_cpu_of_such_a_machine_uses_none(four_gpus: None) -> None:
    assert arguments_on("cpu").n_gpu == 0


# ---- several processes on the CPU ----


def where(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def copied_from(file: Path) -> int:
    """Bytes of a mapped file of which this process has a copy of its own."""
    mapping, found = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            mapping = line.endswith(str(file))
        elif mapping and name == "Anonymous:":
            found.append(int(rest[0]) * 1024)
    assert found, "not mapped"
    return sum(found)


def train_as_one_of_several(folder: Path, method: str, answers: Any) -> None:
    """A step in a process group, here of one; answers where the model's tensors lay before and after it, and how much
    of their file was copied then."""
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    model = attached(read, method, copied=False)
    before, copied = where(model), copied_from(file)
    trainer = trainer_of(model, folder / "run", examples(4), max_steps=1)
    trainer.train()
    wrapped = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    answers.put((wrapped, before, where(model), copied, copied_from(file), hasattr(model, LEFT_OUT)))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
@pytest.mark.parametrize("method", ["s2ft", "lora"])
def test_processes_on_the_cpu_copy_no_weight(method: str, make_model: Any, tmp_path: Path) -> None:
    """Weights are mapped from their files, which all processes of a machine share: a copy would be each one's own. Only
    what is trained in a weight is written."""
    make_model("llama").save_pretrained(tmp_path / "model")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=train_as_one_of_several, args=(tmp_path, method, answers))
    process.start()
    try:
        wrapped, before, after, copied, copied_then, still_told = answers.get(timeout=120)
    finally:
        process.kill()
    assert wrapped and before == after
    assert copied_then == copied and (method == "s2ft" or copied == 0)
    assert not still_told  # somebody else's DDP sends what it trains


# ---- TF32 ----


def precisions() -> list[Any]:
    """All that torch says of how it rounds products of fp32, by its newer names and by its old ones."""
    backends = torch.backends
    newer = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn,
             backends.mkldnn.matmul)  # fmt: skip
    found: list[Any] = [getattr(place, "fp32_precision", None) for place in newer]
    for read in (torch.get_float32_matmul_precision, lambda: backends.cuda.matmul.allow_tf32,
                 lambda: backends.cudnn.allow_tf32):  # fmt: skip
        try:
            found.append(read())
        except RuntimeError:  # not where a newer name has said something else
            found.append("unreadable")
    return found


USERS: dict[str, Any] = {
    "nothing": lambda: None,
    "on": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "off": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "convolutions off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    USERS |= {
        "newer: on": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "newer: off": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        "newer: all on": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "newer: all off": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    }


def compile_as(user: str, folder: str) -> list[list[Any]]:
    """What torch says before, inside, and after the Trainer's arguments and the Trainer are made to compile, then where
    everything that says nothing for itself is told to be exact."""
    from support.models import build_model

    USERS[user]()
    said = [precisions()]
    turn_on, plain = transformers.training_args.enable_tf32, Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        plain(self)
        torch.backends.cuda.matmul.allow_tf32 = True  # as accelerate's state does on CUDA
        said.append(precisions())

    def enable(on: bool) -> None:
        turn_on(on)
        said.append(precisions())

    transformers.training_args.is_torch_tf32_available = lambda: True  # as on a GPU that knows it
    transformers.training_args.enable_tf32 = enable
    Trainer.create_accelerator_and_postprocess = create  # type: ignore[method-assign]
    arguments = arguments_on("cpu", compile="model")
    assert arguments.torch_compile
    said.append(precisions())
    Trainer(build_model("llama"), arguments, run=Path(folder), train_dataset=examples(2), data_collator=Collator(0))
    said.append(precisions())
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "ieee"
    return [*said, precisions()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """`compile_as` of each user, each in a process of its own, as the switches are the process's."""
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=SUPPORT.parent,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{SUPPORT.parent}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {user: json.loads((folder / f"{number}.json").read_text()) for number, user in enumerate(USERS)}


@pytest.mark.parametrize("user", USERS)
def test_compiling_leaves_tf32_as_the_user_had_it(user: str, compiled: dict[str, list[list[Any]]]) -> None:
    before, by_transformers, after_arguments, by_accelerate, after, exact = compiled[user]
    assert "tf32" in (by_transformers[0], by_transformers[1])
    assert by_accelerate[8] is True
    assert after_arguments == before
    assert after[:7] == before[:7]
    for was, now in zip(before[7:], after[7:], strict=True):
        assert now == was or was == "unreadable"
    if user == "nothing" and before[0] is not None:
        # They go on following what is said for all; torch 2.11 keeps what its old name said of convolutions and RNNs.
        following = [0, 1, 2, 5, 6] if Version(torch.__version__) < Version("2.13") else range(7)
        assert {exact[place] for place in following} == {"ieee"}


if __name__ == "__main__":
    for number, user in enumerate(USERS):
        child = os.fork()
        if child == 0:
            try:
                Path(sys.argv[1], f"{number}.json").write_text(json.dumps(compile_as(user, sys.argv[1])))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"failed: {user}")
