"""One of several processes whose training is measured: what tests/training/test_memory_plan.py starts by torchrun.

    python -m torch.distributed.run … tests/support/planning_worker.py CASES.json

CASES: a list of {"name", "overrides"}; rank 0 leaves what it held in its last step as `<name>.json` beside the file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from sparseft.compose.run_config import compose
from sparseft.distributed.fsdp import is_dtensor
from sparseft.distributed.shards import shard_of
from sparseft.files.atomic import write_json
from sparseft.memory import AllocationCounter, tensor_bytes
from sparseft.training.trainer import Trainer


class Measured(transformers.TrainerCallback):
    """Counts every storage of this process from before the first step on; the peak is that of the last step."""

    def __init__(self, trainer: Trainer, counter: AllocationCounter) -> None:
        self.trainer, self.counter = trainer, counter
        self.found: dict[str, int] = {}
        for tensor in self.tensors():  # what DeepSpeed shards goes away again
            counter._count(own(tensor).untyped_storage())
            if hasattr(tensor, "ds_tensor"):  # or was read in shards
                counter._count(tensor.ds_tensor.untyped_storage())
        self.before = counter.live
        self.handle = register_optimizer_step_pre_hook(self.updating)

    def tensors(self) -> list[Tensor]:
        """All that the models are now: held, those that are exchanged would be counted as long as this lives."""
        models = [self.trainer.model, getattr(self.trainer, "ref_model", None)]
        return [each for model in models if model for each in (*model.parameters(), *model.buffers())]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counter.peak = self.counter.live

    def updating(self, optimizer: Any, *_: Any) -> None:
        """Ahead of the update: the gradients are there, the activations are gone."""
        if self.found and self.found["step"] == self.trainer.state.global_step:
            return  # ZeRO updates one group of parameters after the other
        tensors = self.tensors()
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        frozen = [tensor for tensor in tensors if not tensor.requires_grad]
        leaves = tree_leaves(list(optimizer.state.values()))
        moments = [own(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        known = {own(tensor).untyped_storage()._cdata for tensor in trained}
        flat = [tensor for tensor in map(own, optimizer.state) if tensor.untyped_storage()._cdata not in known]
        self.found = {
            "weights": held(frozen),
            "trained": held(trained),
            "moments": tensor_bytes([*moments, *flat]),
            "live": self.counter.live,
            "step": self.trainer.state.global_step,
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found["peak"] = self.counter.peak


def own(tensor: Tensor) -> Tensor:
    """Of a DTensor this process's shard."""
    return shard_of(tensor) if is_dtensor(tensor) else tensor


def held(parameters: Iterable[Tensor]) -> int:
    """Bytes of what this process holds of parameters: under ZeRO-3 its shards beside what stands in their place."""
    parameters = [own(parameter) for parameter in parameters]
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    return tensor_bytes([*parameters, *shards])


class Counter(AllocationCounter):
    """Counts what FSDP2 gathers too: it empties storages and fills them again, which no operation shows. Of DTensors
    shards alone: their own storage is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if is_dtensor(leaf):
                self._count(leaf._local_tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        with contextlib.suppress(RuntimeError):  # a DTensor's own has no place in memory
            storage.data_ptr()
            super()._count(storage)

    @contextlib.contextmanager
    def seeing_sizes(self) -> Iterator[None]:
        usual = {name: getattr(_fsdp_param, name) for name in ("alloc_storage", "free_storage")}

        def call(name: str, tensor: Tensor) -> None:
            before = tensor.untyped_storage().nbytes()
            usual[name](tensor)
            self.live += tensor.untyped_storage().nbytes() - before
            self.peak = max(self.peak, self.live)

        for name in usual:
            setattr(_fsdp_param, name, functools.partial(call, name))
        try:
            yield
        finally:
            for name, function in usual.items():
                setattr(_fsdp_param, name, function)


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    plain = Trainer.train
    for case in json.loads(path.read_text()):
        measured: list[Measured] = []

        def train(self: Trainer, *args: Any, seen: list[Measured] = measured, **options: Any) -> Any:
            with Counter() as counter, counter.seeing_sizes():
                seen.append(Measured(self, counter))
                self.add_callback(seen[0])
                try:
                    return plain(self, *args, **options)
                finally:
                    seen[0].handle.remove()

        Trainer.train = train  # type: ignore[method-assign]
        importlib.import_module("sparseft.commands.train").run(compose("train", case["overrides"]))
        if dist.get_rank() == 0:
            write_json(path.parent / f"{case['name']}.json", measured[0].found)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
