"""No step of a training waits for the device, but where the user asked for a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import dataloader

from sparseft.adapters.lifecycle import attach
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator, PackedDataset
from sparseft.kernels import reference
from sparseft.methods import get_method
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import as_trained
from sparseft.training.arguments import training_arguments
from sparseft.training.recomputing import KINDS as KINDS_MADE_AGAIN
from sparseft.training.reselection.running import Running
from sparseft.training.reselection.turns import Turns, turns_of
from sparseft.training.trainer import Trainer, train
from sparseft.training.verdicts import Verdict, Verdicts
from support.syncs import Audit
from support.training import examples

# Every kind of layer that trains, and the baselines.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "s2ft": ("s2ft", {"sparsity": 0.9, "roles": ["q", "o", "up", "down"]}),
    "s2ft permuted": ("s2ft", {"sparsity": 0.9, "roles": ["o", "down"], "layout": "permuted"}),
    "sylva 64": ("sylva", {"sparsity": 0.5, "block_size": 64, "importance": "weight"}),
    "sylva 16": ("sylva", {"sparsity": 0.9, "block_size": 16, "importance": "weight"}),
    "sylva 4": ("sylva", {"sparsity": 0.9, "block_size": 4, "importance": "weight"}),
    "paca": ("paca", {"sparsity": 0.9}),
    "losia": ("losia", {"sparsity": 0.9}),
    "lora": ("lora", {"rank": 4, "dropout": 0.1}),
    "full": ("full", {"dtype": "model"}),
}
WARMUP, STEPS = 2, 5


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    method, settings = KINDS[kind]
    if method == "s2ft":
        settings = settings | {"importance": "weight"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return attach(model, get_method(method)(**settings))


def trainer_on(
    model: Any, rows: str, run: Path, device: torch.device, options: dict[str, Any] | None = None, **settings: Any
) -> Trainer:
    data: Any = examples(64)
    if rows == "packed":
        data = PackedDataset(data, 32)
    config = TrainerConfig(
        max_steps=STEPS, batch_size=1 if rows == "single" else 2, gradient_accumulation=2, learning_rate=1e-3,
        warmup_steps=1, logging_steps=100, max_grad_norm=1.0, weight_decay=0.1, **settings,
    )  # fmt: skip
    hardware = HardwareConfig(device=device.type)
    arguments = training_arguments(config, hardware, seed=0, device=device, total_steps=STEPS)
    return Trainer(
        model.to(device), arguments, run=run, train_dataset=data, eval_dataset=None,
        data_collator=Collator(0), processing_class=None, **(options or {}),
    )  # fmt: skip


class Between(transformers.TrainerCallback):
    """Calls `start` after the warm-up, and `stop` where the last step begins, whose end is logged and saved."""

    def __init__(self, start: Callable[[], None], stop: Callable[[], None]) -> None:
        self.acts = {WARMUP: start, STEPS - 1: stop}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.acts.get(state.global_step, lambda: None)()


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Audit]:
    """An audit to which two things are the host's own: batches until they leave the loader, and verdicts of earlier
    steps than the last one."""
    audit, latest = Audit(), [0]
    load, add, read = dataloader._BaseDataLoaderIter.__next__, Verdicts.add, Verdict.read

    def loaded(self: Any) -> Any:
        with audit.suspended():
            return load(self)

    def added(self: Verdicts, step: int, *numbers: Any) -> Any:
        latest[0] = step
        return add(self, step, *numbers)

    def reading(self: Verdict) -> Any:
        if self.step >= latest[0]:
            audit.note("a verdict of the step that is under way")
        with audit.suspended():
            return read(self)

    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__next__", loaded)
    monkeypatch.setattr(Verdicts, "add", added)
    monkeypatch.setattr(Verdict, "read", reading)
    yield audit
    audit.stop()


@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, "packed") for kind in KINDS), ("s2ft", "single"), ("lora", "padded")]
)
def test_no_step_waits_for_the_device(kind: str, rows: str, audit: Audit, tmp_path: Path) -> None:
    trainer = trainer_on(model_of(kind), rows, tmp_path, torch.device("cpu"))
    trainer.add_callback(Between(audit.start, audit.stop))
    done = train(trainer, None, STEPS)
    assert audit.found == []
    assert done.step == STEPS and done.bad == 0


@pytest.mark.parametrize(("method", "settings"), [("sylva", {"block_size": 8}), ("s2ft", {"roles": ["up", "down"]})])
def test_no_step_of_experts_waits_for_the_device(
    method: str, settings: dict[str, Any], audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for plain torch's product of the experts' gradients, which a kernel does on GPUs."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    model = attach(plain, get_method(method)(sparsity=0.8, importance="random", **settings))
    product, calls = reference.experts_gradient, []

    def by_a_kernel(*operands: Any) -> Any:
        calls.append(operands)
        with audit.suspended():
            return product(*operands)

    monkeypatch.setattr(reference, "experts_gradient", by_a_kernel)
    trainer = trainer_on(model, "padded", tmp_path, torch.device("cpu"))
    trainer.add_callback(Between(audit.start, audit.stop))
    done = train(trainer, None, STEPS)
    assert audit.found == [] and calls
    assert done.step == STEPS and done.bad == 0


def test_the_audit_sees_what_makes_a_host_wait() -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    waits: dict[str, Callable[[], Any]] = {
        "item": lambda: x[0].item(), "float": lambda: float(x[0]), "bool": lambda: bool(x[0] > 0),
        "if": lambda: 1 if (x > 0).all() else 0, "tolist": x.tolist, "numpy": x.numpy, "cpu": x.cpu,
        "to": lambda: x.to("cpu"), "equal": lambda: torch.equal(x, x), "nonzero": x.nonzero,
        "where": lambda: torch.where(x > 0), "mask": lambda: x[x > 0], "masked_select": lambda: x.masked_select(x > 0),
        "mask assigned": lambda: x.__setitem__(x > 5, torch.ones(())), "unique": x.unique,
        "repeats": lambda: x.repeat_interleave(torch.ones(3, dtype=torch.long)), "tensor": lambda: torch.tensor(1.0),
        "bincount": lambda: x.long().abs().bincount(), 
        "in backward": lambda: Reads.apply(x.requires_grad_()).sum().backward(),
    }  # fmt: skip
    for name, act in waits.items():
        audit = Audit()
        audit.start()
        act()
        audit.stop()
        assert audit.found, name
    audit = Audit()
    audit.start()
    with torch.no_grad():
        torch.where(x > 0, x, 0.0).index_select(0, torch.arange(2)).to(x.device).clone().add_(x[:2]).isfinite().all()
        x[torch.arange(2)].masked_fill(torch.zeros(2, dtype=torch.bool), 1.0).to(torch.float64)
    with audit.suspended():
        x.sum().item()
    audit.stop()
    assert audit.found == []


class Reads(torch.autograd.Function):
    """Reads a number in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * gradient.sum().item()


def test_an_optimizer_without_the_flag_is_waited_for(audit: Audit, tmp_path: Path) -> None:
    """What makes the audit of a whole run fail."""
    trainer = trainer_on(model_of("s2ft"), "packed", tmp_path, torch.device("cpu"), optimizer="sgd")
    trainer.add_callback(Between(audit.start, audit.stop))
    train(trainer, None, STEPS)
    assert set(audit.found) == {"a verdict of the step that is under way in training/test_syncs.py:reading"}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["single", "padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_gpu(kind: str, rows: str, tmp_path: Path) -> None:
    trainer = trainer_on(model_of(kind), rows, tmp_path, torch.device("cuda"))
    mode = torch.cuda.set_sync_debug_mode
    trainer.add_callback(Between(lambda: mode("error"), lambda: mode("default")))
    try:
        done = train(trainer, None, STEPS)
    finally:
        mode("default")
    assert done.step == STEPS and done.bad == 0


@pytest.mark.parametrize("kind", ["s2ft", "sylva 16", "lora"])
def test_nor_does_one_with_labelled_logits_that_keeps_less(kind: str, audit: Audit, tmp_path: Path) -> None:
    """As runs train by default, and with `trainer.checkpointing=selective_up`."""
    options = {"labelled": True, "recomputed": KINDS_MADE_AGAIN["selective_up"]}
    trainer = trainer_on(model_of(kind, torch.bfloat16), "padded", tmp_path, torch.device("cpu"), options=options)
    trainer.add_callback(Between(audit.start, audit.stop))
    done = train(trainer, None, STEPS)
    assert audit.found == []
    assert done.step == STEPS and done.bad == 0


def test_nor_does_one_whose_layers_take_turns(audit: Audit, tmp_path: Path) -> None:
    """Within a turn, with the layer before climbing back; where one ends, what is chosen has to be read."""
    model = model_of("losia", torch.bfloat16)
    trainer = trainer_on(model, "packed", tmp_path, torch.device("cpu"))
    turns = Turns(WARMUP, model, turns_of(model, ModelSpec.of(model)), order="largest", seed=0)
    choosing = turns.on_step_end

    def unaudited(*args: Any, **kwargs: Any) -> None:
        with audit.suspended():
            choosing(*args, **kwargs)

    turns.on_step_end = unaudited  # type: ignore[method-assign]
    trainer.add_callback(turns)
    trainer.add_callback(Between(audit.start, audit.stop))
    assert train(trainer, None, STEPS).step == STEPS
    assert audit.found == []


@pytest.mark.parametrize("kind", ["s2ft permuted", "sylva 16"])
def test_looking_at_gradients_waits_for_nothing(kind: str, audit: Audit, tmp_path: Path) -> None:
    model, spec = model_of(kind), ModelSpec.of(model_of(kind))
    settings = get_method(KINDS[kind][0])(**KINDS[kind][1])
    budget = as_trained(model, settings, spec=spec)
    running = Running(STEPS, model, spec, budget, order="largest", seed=0)
    trainer = trainer_on(model, "packed", tmp_path, torch.device("cpu"))
    trainer.add_callback(running)
    trainer.add_callback(Between(audit.start, audit.stop))
    assert train(trainer, None, STEPS).step == STEPS
    assert audit.found == []
    assert all(total.any() for total in running.sums.totals.values())


@pytest.mark.parametrize("kind", ["s2ft", "sylva 16", "paca", "losia", "lora", "full"])
def test_a_bad_step_is_judged_without_waiting(kind: str, audit: Audit, tmp_path: Path) -> None:
    """In the midst of what is audited: nothing of it reaches weights or moments, and the host counts it afterwards."""
    model = model_of(kind)
    trainer = trainer_on(model, "packed", tmp_path, torch.device("cpu"))
    trainer.add_callback(Between(audit.start, audit.stop))
    bad = WARMUP + 1
    kept: dict[int, list[torch.Tensor]] = {}

    class Spoils(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spoilt.append(state.global_step == bad)
            kept[state.global_step] = state_of(trainer)

    spoilt = [False]

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if spoilt[-1] else output

    model.get_output_embeddings().register_forward_hook(spoil)
    trainer.add_callback(Spoils())
    done = train(trainer, None, STEPS)
    assert audit.found == []
    assert done.step == STEPS and done.bad == 1
    before, after, later = (kept[bad + steps] for steps in (0, 1, -1))
    assert all(map(torch.equal, before, after))
    assert not all(map(torch.equal, before, later))
    assert all(p.isfinite().all() for p in model.parameters())


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """What trains, and the optimizer's moments, copied."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    moments = [optimizer.state[p][name] for p in trained if optimizer.state[p] for name in ("exp_avg", "exp_avg_sq")]
    return [t.detach().clone() for t in (*trained, *moments)]
