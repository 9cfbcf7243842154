"""A trainer or a sampler that live patching joins: a process of its own.

    python tests/support/live_worker.py JOB.json ROLE     over a folder
    python -m torch.distributed.run … live_worker.py JOB.json     the process of rank 0 trains, that of rank 1 samples

JOB: {"base": folder, "kind": kind of `adapted`, "live": folder or null, "out": folder, "steps": n}. Each role appends a
line to `<out>/<role>.jsonl` for each step: its number, and the hash of all weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import sparseft
from support import adapted
from support.experts import batch


def weights_hash(model: Any) -> str:
    """A hash over a plain model's names and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain_hash(attached: Any, base: Any) -> str:
    """`weights_hash` of the plain model that an attached one stands for."""
    state = attached.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()})
    return weights_hash(base)


def note(job: dict[str, Any], role: str, step: int, digest: str) -> None:
    with open(Path(job["out"]) / f"{role}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps([step, digest]) + "\n")


def train(job: dict[str, Any], to: Any) -> None:
    """A bare loop: AdamW on the adapter, a step sent after each of its own."""
    plain = adapted.load(Path(job["base"]))
    model = adapted.attached(job["kind"], "fused", adapted.load(Path(job["base"])))
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=0.05)
    with sparseft.PatchSender(model, to, timeout=120) as sender:
        for step in range(1, job["steps"] + 1):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            note(job, "trainer", step, plain_hash(model, plain))  # first, so that it is there whatever is received
            assert sender.send() == step


def sample(job: dict[str, Any], source: Any) -> None:
    model = adapted.load(Path(job["base"]))
    with sparseft.PatchReceiver(model, source, timeout=120) as receiver:
        for step in receiver:
            note(job, "sampler", step, weights_hash(model))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["live"] is not None:
        {"train": train, "sample": sample}[sys.argv[2]](job, job["live"])
        return
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    (train if rank == 0 else sample)(job, sparseft.PatchPeer(1 - rank))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
