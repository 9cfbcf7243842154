"""One of several processes that train small models, case after case: tests/processes/test_distributed.py starts them.

    python -m torch.distributed.run … tests/support/distributed_worker.py CASES.json

CASES: a list of {"name", "overrides", "command", "refused", "bad", "what", "cut"}; each is composed and run by
`sparseft.commands`. Rank 0 leaves its result as `<name>.json` beside the file (others: `<name>-rank<r>.json`), or the
message of one that is to be refused or to fail. The cases share the time that torch and DeepSpeed take to be imported.
With "bad", the losses of those micro-steps (1-based) are bad in the last process, in the way that "what" names. With
"cut" the run of that name is first copied, as it was after its second step, under the case's own name, to go on with.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from sparseft.compose.run_config import compose
from sparseft.errors import RunError, UserError
from sparseft.files.atomic import write_json
from support.pages import blank_pages
from support.ranks import cut_after_two

BAD = {  # what becomes of a bad micro-step's loss
    "loss": lambda loss: loss * float("nan"),
    "value": lambda loss: loss + float("inf"),  # its gradient is finite
    "gradient": lambda loss: _Steep.apply(loss),  # the loss itself is finite
}


class _Steep(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


@contextlib.contextmanager
def spoilt(micro_steps: Sequence[int], what: str) -> Iterator[None]:
    """Inside, the losses of some micro-steps (1-based) are bad in the last process."""
    compute, calls = transformers.Trainer.compute_loss, itertools.count(1)

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, *args, **kwargs)
        bad = model.training and next(calls) in micro_steps and dist.get_rank() == dist.get_world_size() - 1
        return BAD[what](loss) if bad else loss

    transformers.Trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        transformers.Trainer.compute_loss = compute


def main(path: Path) -> None:
    dist.init_process_group("gloo")  # once; sparseft finds it and leaves it
    for case in json.loads(path.read_text()):
        module = importlib.import_module(f"sparseft.commands.{case['command']}")
        if "cut" in case:
            if dist.get_rank() == 0:
                cut_after_two(path.parent / case["cut"], path.parent / case["name"])
            dist.barrier()
        try:
            with blank_pages(), spoilt(case.get("bad", ()), case.get("what", "loss")):
                result = module.run(compose(case["command"], case["overrides"]))
        except (UserError, RunError) as error:
            if not case.get("refused"):
                raise
            result = {"message": str(error), "last_checkpoint": getattr(error, "last_checkpoint", None)}
        of_rank = f"-rank{dist.get_rank()}" if dist.get_rank() else ""
        write_json(path.parent / f"{case['name']}{of_rank}.json", result)
        dist.barrier()
        gc.freeze()  # what the case imported: every case asks for collections, which would go through it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
