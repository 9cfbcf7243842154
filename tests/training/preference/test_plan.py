"""`sparseft train --plan objective=…`: what it counts without weights is what a step takes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from sparseft.commands import plan as command
from sparseft.compose.run_config import compose
from sparseft.training.trainer import Trainer
from support.models import build_tokenizer
from support.planning_worker import Counter, Measured
from support.running import files, sparseft, working_in

pytest.importorskip("trl")
BATCH, LENGTH = 2, 64
METHODS = {
    "s2ft": ["method=s2ft", "sparsity=0.95"],
    "sylva": ["method=sylva", "sparsity=0.95", "method.block_size=16", "method.num_samples=4"],
    "lora": ["method=lora", "sparsity=0.95", "method.dropout=0"],
    "dora": ["method=dora", "sparsity=0.95", "method.dropout=0"],
    "full": ["method=full"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for its activations to count, and pairs that are all as long as they may be."""
    folder = tmp_path_factory.mktemp("planned")
    tokenizer = build_tokenizer()
    content = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        vocab_size=len(tokenizer) + 8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(content).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answers = {"chosen": " is a number" * 40, "rejected": " was no number" * 40}
    lines = [json.dumps({"prompt": f"{at}", **answers}) for at in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def words(objective: str, method: str, *more: str) -> list[str]:
    return [
        f"objective={objective}", *METHODS[method], "model.path=model", "dataset.train_path=pairs.jsonl",
        f"trainer.max_length={LENGTH}", f"trainer.batch_size={BATCH}", "trainer.gradient_accumulation=1",
        "trainer.max_steps=3", "trainer.warmup_steps=0", "dataset.eval_fraction=0", "dataset.eval_path=null",
        "hardware=cpu", "model.dtype=float32", *more,
    ]  # fmt: skip


def measured(world: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> dict[str, int]:
    """What a real run held in its last step, and at most."""
    seen: list[Any] = []
    plain = Trainer.train

    def train(self: Trainer, *args: Any, **options: Any) -> Any:
        with Counter() as counter:
            seen.append(Measured(self, counter))
            self.add_callback(seen[0])
            try:
                return plain(self, *args, **options)
            finally:
                seen[0].handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        sparseft(world, "train", *overrides)
    return seen[0].found


EVERY = [(objective, method) for objective in ("dpo", "ipo", "kto", "orpo", "simpo") for method in METHODS]
DAILY = [("dpo", "s2ft"), ("dpo", "lora"), ("dpo", "full"), ("kto", "sylva"), ("orpo", "s2ft"), ("simpo", "full")]


@pytest.mark.parametrize(
    ("objective", "method"),
    [each if each in DAILY else pytest.param(*each, marks=pytest.mark.slow) for each in EVERY],
)
def test_the_plan_is_what_a_step_takes(
    objective: str, method: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = words(objective, method)
    real = measured(world, monkeypatch, [*overrides, f"output_dir={objective}-{method}"])
    before = files(world)
    plan = sparseft(world, "train", "--plan", *overrides, "--json").json
    assert files(world) == before
    memory = plan["per_device"]
    print(f"\n{objective} {method}: {memory['total'] / 2**20:.2f} MiB planned, {real['peak'] / 2**20:.2f} measured")
    assert memory["total"] == pytest.approx(real["peak"], rel=0.05)
    assert plan["sequences"] == (BATCH if objective == "kto" else 2 * BATCH) and plan["predicted_floors"] is None
    for name in ("weights", "trained", "moments"):
        assert memory[name] == pytest.approx(real[name], rel=0.01), name


def test_full_counts_the_copy_that_it_is_compared_with(world: Path) -> None:
    whole = {objective: plan_of(world, objective, "full") for objective in ("dpo", "simpo", "sft")}
    copy = whole["dpo"]["per_device"]["weights"] - whole["simpo"]["per_device"]["weights"]
    assert copy == 4 * whole["dpo"]["total_parameters"]
    assert whole["sft"]["objective"] == "sft" and whole["sft"]["sequences"] == BATCH


def test_the_copy_is_as_wide_as_what_trains(world: Path) -> None:
    """On a GPU a bf16 model trains in fp32, and is copied when it is that already."""
    gpu = ["hardware.device=cuda", "hardware.memory_gib=80", "model.dtype=bfloat16"]
    dpo, simpo = (plan_of(world, objective, "full", *gpu) for objective in ("dpo", "simpo"))
    assert dpo["per_device"]["trained"] == 4 * dpo["total_parameters"]
    assert dpo["per_device"]["weights"] - simpo["per_device"]["weights"] == 4 * dpo["total_parameters"]


def plan_of(world: Path, objective: str, method: str, *more: str) -> dict[str, Any]:
    given = [word for word in words(objective, method, *more) if objective != "sft" or "dataset" not in word]
    with working_in(world):
        return command.run(compose("train", given))


def test_activations_computed_again_are_counted_so(world: Path) -> None:
    plain, again = (
        plan_of(world, "dpo", "s2ft", f"trainer.checkpointing={way}")["per_device"]["activations"]
        for way in ("none", "full")
    )
    assert again < 0.8 * plain


def test_a_remedy_is_one_that_the_objective_takes(world: Path) -> None:
    """KTO needs two answers at once, and no objective is sharded."""
    many = ["trainer.batch_size=8", "hardware.num_processes=2"]
    for objective, least in (("kto", 2), ("dpo", 1)):
        few = plan_of(world, objective, "s2ft", f"hardware.micro_batch={least}", *many)["per_device"]["total"]
        told = plan_of(world, objective, "s2ft", *many, f"hardware.memory_gib={few / 2**30}")
        assert told["fits"] is False and told["remedy"]["overrides"] == [f"hardware.micro_batch={least}"]
        assert plan_of(world, objective, "s2ft", *many, "hardware.memory_gib=0.01")["remedy"] is None


def test_the_plan_says_what_it_counts(world: Path) -> None:
    said = sparseft(world, "train", "--plan", *words("dpo", "s2ft")).out
    assert "4 x 64 tokens at once" in said and "by tokens and pairs at once" in said and "A step is" not in said
    assert "by tokens and answers at once" in sparseft(world, "train", "--plan", *words("kto", "s2ft")).out


def test_the_plan_has_no_batch_that_training_refuses(world: Path) -> None:
    for objective, batches in (("kto", {2, 4}), ("dpo", {1, 2, 4})):
        rows = plan_of(world, objective, "s2ft")["by_length_and_batch"]
        assert {row["batch"] for row in rows} == batches
