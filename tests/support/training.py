"""Small training runs: a model with an adapter, its examples, its trainer, and how two runs are compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator
from sparseft.data.tokenized import TokenizedDataset
from sparseft.methods import get_method
from sparseft.training.arguments import training_arguments
from sparseft.training.trainer import Trainer
from support.running import METHODS, files, metrics, on, summary

CPU = torch.device("cpu")


def examples(count: int, seed: int = 0, vocabulary: int = 96) -> TokenizedDataset:
    """Random examples of 4 to 20 tokens, the first ones without a label: means over examples and tokens differ."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        length = int(generator.integers(4, 21))
        ids = generator.integers(3, vocabulary, length).tolist()
        prompt = int(generator.integers(1, length - 1))
        pairs.append((ids, [-100] * prompt + ids[prompt:]))
    return TokenizedDataset.from_lists(pairs)


def attached(model: Any, method: str, copied: bool = True) -> Any:
    """A copy of the model made trainable (or the model itself), the choice by weight so that no data is needed."""
    cls = get_method(method)
    settings = {
        "s2ft": {"sparsity": 0.8, "roles": ["q", "o", "up", "down"], "importance": "weight"},
        "sylva": {"sparsity": 0.8, "block_size": 16, "importance": "weight"},
        "lora": {"rank": 2, "dropout": 0.0},
        "full": {"dtype": "model"},
    }
    return attach(copy.deepcopy(model) if copied else model, cls(**settings[method]))


def trainer_of(
    model: Any, run: Path, data: TokenizedDataset, evaluation: TokenizedDataset | None = None, **settings: Any
) -> Trainer:
    config = TrainerConfig(**{"warmup_steps": 0, "logging_steps": 1, "learning_rate": 1e-2, **settings})
    arguments = training_arguments(
        config, HardwareConfig(), seed=0, device=CPU, total_steps=config.max_steps,
    )  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model, arguments, run=run, save_total_limit=config.save_total_limit, train_dataset=data,
        eval_dataset=evaluation, data_collator=Collator(0), processing_class=None,
    )  # fmt: skip


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def long_run(method: str, model: Path, data: Path) -> list[str]:
    """Seven steps of three an epoch (the last of each with a partial accumulation), checkpoints at 2, 4, 6 and 7."""
    words = [*on(model, data), *METHODS[method], "trainer.max_steps=7", "trainer.save_steps=2", "trainer.eval_steps=3"]
    words += [
        "trainer.logging_steps=3",
        "trainer.save_total_limit=9",
        "dataset.max_examples=11",
        "trainer.learning_rate=5e-3",
    ]
    return ["train", *words, "trainer.warmup_steps=2", "trainer.weight_decay=0.1"]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def same_end(run: Path, whole: Path) -> None:
    """The adapter, the losses of every line and the summary's facts are those of the uninterrupted run."""
    expected = tensors(whole)
    found = tensors(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    facts = "step epoch loss eval_loss learning_rate grad_norm".split()
    assert [{k: line.get(k) for k in facts} for line in metrics(run)] == [
        {k: line.get(k) for k in facts} for line in metrics(whole)
    ]
    for key in "steps tokens train_loss eval_loss_before eval_loss_after trainable_parameters sparsity".split():
        assert summary(run)[key] == summary(whole)[key], key
    assert files(run) == files(whole)


class At:
    """A callback that does something once, when a step begins."""

    def __new__(cls, step: int, act: Any) -> Any:
        import transformers

        class Callback(transformers.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == step:
                    act()

        return Callback()


def spoil(trainer: Any, steps: set[int], what: str = "loss") -> None:
    """Makes the loss, or the gradient alone, of some optimizer steps (1-based) NaN."""
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, **options: Any) -> Any:
        loss = plain(model, inputs, **options)
        if trainer.state.global_step + 1 in steps:
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    trainer.compute_loss = compute_loss
