"""The presets of the papers' tables: each composes to the published settings, and takes two steps on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseft.compose.run_config import compose, options
from support.presets import PRESETS, SMALL, TABLES
from support.running import sparseft, summary

ONE_CARD = ("s2ft_llama3_70b_nf4_1xh100", "sylva_llama3_70b_nf4_1xh100")


def make(name: str, *words: str) -> Any:
    return compose("train", [f"experiment={name}", *words])


def test_every_row_of_the_tables_is_there() -> None:
    assert set(PRESETS) <= set(options("experiment"))
    named = [name for name in options("experiment") if name.split("_")[0] in ("s2ft", "sylva", "lora", "dora", "full")]
    assert sorted(named) == sorted([*PRESETS, *ONE_CARD])  # and none that no test runs


@pytest.mark.parametrize("name", ONE_CARD)
def test_a_70b_model_on_one_card(name: str, tmp_path: Path) -> None:
    """All but its size: two steps on the tiny model, whose rows NF4 does not pack here."""
    config = make(name)
    assert config.model.path == "meta-llama/Meta-Llama-3-70B" and config.model.quantize == "nf4"
    assert config.hardware.memory_gib == 79 and config.checkpointing == "full"
    small = ["model=tiny", "hardware=cpu", "method.d_ratio=0.2"] if "s2ft" in name else ["model=tiny", "hardware=cpu"]
    small += ["method.block_size=8"] if "sylva" in name else []
    words = ["model.quantize=none", "trainer.max_steps=2", "trainer.batch_size=2", "output_dir=run"]
    sparseft(tmp_path, "train", f"experiment={name}", *small, *words)
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("row", [row for row in TABLES if row.startswith("llama") and "7b" not in row])
def test_rows_of_one_table_differ_only_in_the_method(row: str) -> None:
    """Same model, data, evaluation and schedule; the learning rate is each method's own."""
    rows = {method: make(f"{method}_{row}") for method in TABLES[row]}
    first, *others = rows.values()
    for config in others:
        for section in ("model", "dataset", "eval", "hardware"):
            assert getattr(config, section) == getattr(first, section)
        left, right = dict(vars(config.trainer)), dict(vars(first.trainer))
        assert left.pop("learning_rate") and right.pop("learning_rate")
        assert left == right
    for method, config in rows.items():
        assert config.method_name == method


@pytest.mark.parametrize(
    ("data", "rates", "beams"),
    [
        ("commonsense", {"s2ft": 2e-4, "lora": 5e-5, "dora": 5e-5, "full": 1e-5}, 1),
        ("arithmetic", {"s2ft": 1e-3, "lora": 2e-4, "dora": 2e-4, "full": 2e-5}, 4),
    ],
)
@pytest.mark.parametrize("model", ["llama2", "llama3"])
def test_settings_of_the_s2ft_papers_scripts(model: str, data: str, rates: dict[str, float], beams: int) -> None:
    for method, rate in rates.items():
        config = make(f"{method}_{model}_{data}")
        trainer = config.trainer
        assert trainer.learning_rate == rate
        assert trainer.batch_size * trainer.gradient_accumulation == 64
        assert (trainer.num_epochs, trainer.max_length, trainer.warmup_steps) == (3, 2048, 100)
        assert trainer.keep_best == (data == "commonsense")
        assert config.eval.num_beams == beams
        if method in ("lora", "dora"):
            assert (config.method.rank, config.method.alpha, config.method.dropout) == (32, 64, 0.05)
            assert config.method.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
            assert config.method.use_dora == (method == "dora")


def test_sylva_and_lora_train_as_many_weights_in_both_scopes() -> None:
    """Counted on LLaMA-7B's shapes, without weights; all linears and attention alone to within a tenth."""
    import torch
    import transformers

    from sparseft import attach, compute_selection
    from sparseft.adapters.lifecycle import trainable_count

    config = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    counts = {}
    for scope in ("", "_linear"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        random = make(f"sylva_llama7b_oasst1{scope}", "method.importance=random")
        selection = compute_selection(model, random.method)
        counts[f"sylva{scope}"] = selection.meta["trainable_parameters"]
        counts[f"lora{scope}"] = trainable_count(attach(model, make(f"lora_llama7b_oasst1{scope}").method))
    assert abs(counts["sylva"] - counts["lora"]) < 0.02 * counts["sylva"], counts
    assert abs(counts["sylva_linear"] - counts["lora_linear"]) < 0.02 * counts["sylva_linear"], counts
    assert abs(counts["sylva"] - counts["sylva_linear"]) < 0.1 * counts["sylva"], counts


DAILY = ["lora_llama7b_oasst1"]  # beside one of each sparse method above; every method runs in test_end_to_end.py


@pytest.mark.parametrize("name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow)
                                  for name in PRESETS])  # fmt: skip
def test_dry_run(name: str, in_tmp: Path) -> None:
    """Two steps in this process, on the bundled model and data."""
    config = make(name)
    records = [
        {"instruction": f"Say {n}.", "input": "", "output": f"the answer is {n}", "answer": str(n)} for n in range(12)
    ]
    if config.dataset.name == "oasst1":
        records = [{"text": f"### Human: say {n}### Assistant: it is {n}"} for n in range(12)]
    Path("data.json").write_text(json.dumps(records))
    words = [*SMALL, "dataset.train_path=data.json", "output_dir=run"]
    if config.trainer.eval_steps:
        words += ["trainer.eval_steps=1"]
    if config.method_name == "sylva":
        words += ["method.block_size=8", "method.num_samples=2"]
    done = sparseft(in_tmp, "train", f"experiment={name}", *words)
    assert done.code == 0
    result = summary(in_tmp / "run")
    assert result["method"] == config.method_name and result["steps"] == 2
    assert 0 < result["trainable_parameters"] <= result["total_parameters"]
    assert result["trainable_parameters"] == result["total_parameters"] or config.method_name != "full"
    assert (in_tmp / "run" / "adapter" / "adapter_config.json").is_file() or config.method_name == "full"
