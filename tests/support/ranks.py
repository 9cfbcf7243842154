"""Several processes that train, started as torchrun starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.places import ROOT
from support.running import sparseft, write_data

TWO = "hardware.num_processes=2"


WORKER = Path(__file__).with_name("distributed_worker.py")


METHODS = {
    "s2ft": ["method=s2ft", "sparsity=0.9", "method.roles=[v,o,up,down]"],
    "permuted": ["method=s2ft", "sparsity=0.9", "method.roles=[up,down]", "method.layout=permuted"],
    "sylva": ["method=sylva", "sparsity=0.9", "method.block_size=8", "method.num_samples=6"],
    "lora": ["method=lora", "sparsity=0.9", "method.dropout=0"],
    "dora": ["method=dora", "sparsity=0.9", "method.dropout=0"],
    "full": ["method=full"],
    "paca": ["method=paca", "sparsity=0.9"],
    "losia": ["method=losia", "sparsity=0.9", "method.reselect_steps=0"],
    "bf16": ["method=full", "method.dtype=model", "model.dtype=bfloat16"],  # the weights that train are rounded
}


# 19 training examples: an epoch ends in half a step, and with a process that has no example left.
COMMON = [
    *("dataset=json", "dataset.eval_fraction=0.2", "trainer.max_length=96", "trainer.max_steps=5", "hardware=cpu"),
    *("trainer.warmup_steps=0", "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "trainer.weight_decay=0.01"),
    *("trainer.max_grad_norm=0.5", "model.dtype=float32"),
]


Stage = int | str  # ZeRO's, or "fsdp"


def sharing(stage: Stage) -> str:
    return "hardware.fsdp=true" if stage == "fsdp" else f"hardware.zero_stage={stage}"


def split(batch_size: int, accumulation: int) -> list[str]:
    return [f"trainer.batch_size={batch_size}", f"trainer.gradient_accumulation={accumulation}"]


def run_ranks(
    folder: Path, cases: Sequence[dict[str, Any]], ranks: int = 2, seconds: float = 600, worker: Path = WORKER
) -> None:
    """Runs the cases one after another in as many processes, which torchrun starts."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=localhost"),
            *(f"--master-port={port}", str(worker), str(path)),
        ],
        cwd=folder,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        },
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-9000:]


class Runs:
    """Runs of one process, each made once, and those of two that are held against them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.base = [*COMMON, f"model.path={model}", f"dataset.train_path={write_data(folder)['json']}"]
        self.alone: dict[str, Path] = {}

    def one(self, method: str, *words: str) -> Path:
        """The run of one process, which sees 8 sequences a step."""
        name = f"{method}-alone"
        if name not in self.alone:
            self.alone[name] = self.folder / name
            sparseft(self.folder, "train", *self.base, *METHODS[method], *split(2, 4), f"output_dir={name}", *words)
        return self.alone[name]

    def case(self, method: str, stage: Stage, *words: str) -> dict[str, Any]:
        """The same run as one of two processes makes it: 4 sequences each."""
        name = f"{method}-{stage}"
        overrides = [*self.base, *METHODS[method], *split(2, 2), f"output_dir={name}", sharing(stage)]
        return {"name": name, "command": "train", "overrides": [*overrides, TWO, *words]}


def cut_after_two(whole: Path, folder: Path) -> None:
    """A copy of a run as it was after its second step."""
    shutil.copytree(whole, folder)
    for step in (3, 4, 5):
        shutil.rmtree(folder / f"checkpoints/checkpoint-{step}")
    shutil.rmtree(folder / "adapter")
    (folder / "summary.json").unlink()
    assert (folder / "checkpoints/checkpoint-2/manifest.json").exists()


def trained(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained, in float64."""
    (file,) = (run / "adapter").glob("*model.safetensors")
    return {name: value.double() for name, value in load_file(file).items()}
