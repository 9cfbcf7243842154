"""One of two processes that load models in shards: what tests/processes/test_sharding.py starts by torchrun.

    python -m torch.distributed.run … tests/support/sharding_worker.py JOB.json

JOB: {"models": {name: {"path", "dtype", "importances"}}, "broken": {name: path}}. Each model is loaded in shards, by
ZeRO-3 and by FSDP2, then whole, and held against that; each process leaves what it found as `zero-<n>.json` and
`fsdp-<n>.json` beside the file.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sparseft import S2FTConfig, SylvaConfig, attach, compute_selection, detach
from sparseft.config import HardwareConfig, ModelConfig
from sparseft.distributed.deepspeed import forget_zero
from sparseft.distributed.fsdp import is_dtensor
from sparseft.distributed.shards import cast, full_shape, gathered, is_sharded, load_state, shard_of, state_on_first
from sparseft.errors import UserError
from sparseft.files.atomic import write_json
from sparseft.memory import AllocationCounter
from sparseft.models import loading
from sparseft.models.decoder import decoder_layers, runnable
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.loading import load_in_shards, load_model
from sparseft.models.probing import check_causal
from sparseft.models.spec import ModelSpec

ZERO = HardwareConfig(device="cpu", num_processes=2, zero_stage=3)
FSDP = HardwareConfig(device="cpu", num_processes=2, fsdp=True)


class Counter(AllocationCounter):
    """Of bytes that are there: the process that reads no values has the checkpoint's tensors on the meta device."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def bytes_alive() -> int:
    """Bytes of all floating-point tensors that Python can reach; of a DTensor its shard is another one."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if (
            issubclass(type(item), torch.Tensor)
            and not is_dtensor(item)
            and not item.is_meta
            and item.is_floating_point()
        ):
            storage = item.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def bytes_left(counts: int = 5, pause: float = 0.1) -> int:
    """The least of a few counts. gloo's own thread lets go of a gathered tensor some time after the waiting for it has
    ended, on a busy machine a good while after, and until then Python's object lives; what is really held stays."""
    least = bytes_alive()
    for _ in range(counts - 1):
        time.sleep(pause)
        least = min(least, bytes_alive())
    return least


def samples(count: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    lengths = [5 + 3 * number for number in range(count)]
    return [{"input_ids": torch.randint(vocabulary, (1, length), generator=generator)} for length in lengths]


def same_selection(left: Any, right: Any) -> bool:
    return left.modules.keys() == right.modules.keys() and all(
        torch.equal(index, right.modules[name][kind])
        for name, kinds in left.modules.items()
        for kind, index in kinds.items()
    )


def compare(hardware: HardwareConfig, path: str, dtype: str, importances: list[str]) -> dict[str, Any]:
    """What is the same of a model loaded in shards and one loaded whole, and what the first one holds."""
    config, device = ModelConfig(path=path, dtype=dtype), torch.device("cpu")
    gc.collect()
    gc.freeze()  # what is there by now is left out of the counts, which take long with the libraries' objects
    before = bytes_left()
    # What the trial of the loaded model takes for its activations is not the loading's: it comes after the count.
    with Counter() as counter, mock.patch.object(loading, "check_causal"):
        model, alive = load_in_shards(config, hardware, device)
    with runnable(model):
        check_causal(model, path)
    found: dict[str, Any] = {"resident": bytes_left() - before, "peak": counter.peak}
    forget_zero()  # what comes now is loaded whole
    whole = load_model(config, device)
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in whole.modules())
    if hardware.fsdp:
        inside = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(whole)[1]]
        largest = max(*inside, sum(p.nbytes for p in whole.parameters()) - sum(inside))
    found["fsdp"] = hardware.fsdp
    found["whole"], found["largest"] = sum(p.nbytes for p in whole.parameters()), largest
    found["experts"] = sum(p.nbytes for p in whole.parameters() if p.dim() == 3)
    found["shards"] = sum(shard_of(p).nbytes + (0 if hardware.fsdp else p.nbytes) for p in model.parameters())

    ours, theirs = dict(model.named_parameters()), dict(whole.named_parameters())
    same = found["same"] = {"names": list(ours) == list(theirs)}  # a tied one has one name
    for name, parameter in theirs.items():
        with gathered([ours[name]]) as (gathered_one,):
            same[name] = ours[name].dtype == parameter.dtype and torch.equal(gathered_one, parameter)
            same[f"{name} in its place"] = model.get_parameter(name) is gathered_one
        same[f"{name} is sharded again"] = model.get_parameter(name) is ours[name] and is_again(ours[name])
        same[f"{name}'s shape"] = full_shape(ours[name]) == parameter.shape
    ours, theirs = dict(model.named_buffers()), dict(whole.named_buffers())
    same["buffers"] = ours.keys() == theirs.keys() and all(
        ours[name].dtype == buffer.dtype and torch.equal(ours[name], buffer) for name, buffer in theirs.items()
    )
    same["generation config"] = model.generation_config.to_dict() == whole.generation_config.to_dict()
    same["config"] = model.config.to_dict() == whole.config.to_dict()
    same["mode"] = model.training == whole.training
    same["spec"] = ModelSpec.of(model) == ModelSpec.of(whole)
    same["fingerprint"] = base_fingerprint(model) == base_fingerprint(whole)
    state, expected = state_on_first(model), whole.state_dict()
    if dist.get_rank() == 0:
        same["state"] = list(state) == list(expected) and all(torch.equal(state[k], v) for k, v in expected.items())
    else:
        same["state"] = not state

    passes(model, whole, same)
    for importance in importances:
        choose(model, whole, importance, same)
    if importances:
        attached(model, same)
    changed = {name: value + 1 for name, value in expected.items()}
    if not hardware.fsdp:
        changed = {name: value.float() for name, value in changed.items()}
        cast(model, torch.float32)
        same["cast"] = all(p.dtype == shard_of(p).dtype == torch.float32 for p in model.parameters())
    load_state(model, [changed] if dist.get_rank() == 0 else [{}])
    for name, parameter in model.named_parameters():
        with gathered([parameter]) as (gathered_one,):
            same[f"{name} changed"] = torch.equal(gathered_one, changed[name])
    del alive
    return found


def is_again(parameter: torch.Tensor) -> bool:
    """Whether a process holds half of a parameter's rows, or (ZeRO-3) nothing in its place."""
    if hasattr(parameter, "ds_id"):
        return parameter.numel() == 0
    return is_sharded(parameter) and abs(2 * shard_of(parameter).shape[0] - parameter.shape[0]) <= 1


def passes(model: Any, whole: Any, same: dict[str, bool]) -> None:
    """Logits, and the gradient of the embeddings' output."""
    ids = samples(3, 40)[dist.get_rank()]["input_ids"]  # each its own
    results = []
    for each in (model, whole):
        found: list[torch.Tensor] = []
        handle = each.get_input_embeddings().register_forward_hook(
            lambda _m, _i, y, found=found: found.append(y.detach().requires_grad_()) or found[-1]
        )
        with runnable(each):
            logits = each(input_ids=ids, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), found[0])
        handle.remove()
        results.append((logits, gradient))
    close = (torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in zip(*results, strict=True))
    same["logits"], same["gradient"] = close
    same["sharded after a pass"] = all(map(is_again, model.parameters()))


def choose(model: Any, whole: Any, importance: str, same: dict[str, bool]) -> None:
    """What is chosen of three samples in two processes, of which one has a sample more than the other."""
    for settings in (S2FTConfig(0.9, importance=importance), SylvaConfig(0.9, importance=importance, block_size=8)):
        ours, theirs = (compute_selection(each, settings, samples(3, 40)) for each in (model, whole))
        same[f"{type(settings).__name__} {importance}"] = same_selection(ours, theirs)


def attached(model: Any, same: dict[str, bool]) -> None:
    """A fresh attach leaves the logits as they were; the permuted layout but for the order of sums."""
    ids = samples(1, 40)[0]["input_ids"]
    with torch.no_grad():
        with runnable(model):
            before = model(input_ids=ids).logits
        for settings in (S2FTConfig(0.9, layout="permuted"), SylvaConfig(0.9, importance="weight", block_size=8)):
            with runnable(attach(model, settings)):
                after = model(input_ids=ids).logits
            loose = 1e-4 if before.dtype == torch.float32 else 0.1
            same[f"{type(settings).__name__} attached"] = torch.allclose(before, after, rtol=loose, atol=loose)
            fingerprint = model._sparseft.fingerprints[0]
            detach(model)
            same[f"{type(settings).__name__} detached"] = fingerprint == base_fingerprint(model)


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    job = json.loads(path.read_text())
    for name, hardware in {"zero": ZERO, "fsdp": FSDP}.items():
        write_json(path.parent / f"{name}-{dist.get_rank()}.json", results(job, hardware))
    dist.destroy_process_group()


def results(job: dict[str, Any], hardware: HardwareConfig) -> dict[str, Any]:
    result: dict[str, Any] = {name: compare(hardware, **settings) for name, settings in job["models"].items()}
    for name, folder in job["broken"].items():
        try:
            load_in_shards(ModelConfig(path=folder), hardware, torch.device("cpu"))
        except UserError as error:
            result[name] = str(error)
        forget_zero()
        dist.barrier()
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
