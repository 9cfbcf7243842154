"""Runs by preferences, beside TRL's own trainers on a dense model whose gradient is masked, with a second reference."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import sparseft as sparseft_package
from sparseft.adapters.lifecycle import load_adapter
from sparseft.compose.run_config import compose
from sparseft.config import BUNDLED_ROOT
from sparseft.data.loaded import Preferences
from sparseft.data.loading import data_of
from sparseft.data.sampling import PaddedDataset
from sparseft.data.tokenized import IGNORED, TokenizedDataset
from sparseft.training.arguments import training_arguments
from sparseft.training.preference import batches
from sparseft.training.preference.batches import Tokenised
from sparseft.training.preference.objectives import OBJECTIVES
from sparseft.training.preference.trainer import make_trainer
from sparseft.training.spikes import ROW
from sparseft.training.trainer import COUNT, LEARNT, PLACES
from support.nf4 import quantize
from support.running import metrics, refused, sparseft, summary
from support.training import same_end

trl = pytest.importorskip("trl")
BATCH, ACCUMULATION, STEPS = 4, 2, 3
RATE = 5e-3
METHODS = {
    "s2ft": ["method=s2ft", "sparsity=0.9"],
    "sylva": ["method=sylva", "sparsity=0.9", "method.block_size=16", "method.num_samples=4"],
}
SETTINGS = [
    "hardware=cpu", "model.dtype=float32", f"trainer.batch_size={BATCH}", f"trainer.learning_rate={RATE}",
    f"trainer.gradient_accumulation={ACCUMULATION}", "trainer.warmup_steps=0", "trainer.logging_steps=1",
    f"trainer.max_steps={STEPS}",
]  # fmt: skip


def records(name: str = "train") -> list[dict[str, str]]:
    lines = (BUNDLED_ROOT / f"data/preference/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny", dtype=torch.float32)


def pattern_of(adapter: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Of each weight that an adapter trains, the entries."""
    masks: dict[str, torch.Tensor] = {}
    for name, index in adapter.items():
        module, kind, what = name.rsplit(".", 2)
        if what != "index":
            continue
        mask = masks.setdefault(f"{module}.weight", torch.zeros_like(model.get_parameter(f"{module}.weight")))
        if kind == "rows":
            mask[index] = 1
        elif kind == "columns":
            mask[:, index] = 1
        else:
            size = adapter[f"{module}.blocks.delta"].shape[-1]
            for row, column in index.tolist():
                mask[row * size : (row + 1) * size, column * size : (column + 1) * size] = 1
    return masks


def learnt(adapter: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    found = {}
    for name, mask in pattern_of(adapter, model).items():
        module, whole = name.removesuffix(".weight"), torch.zeros_like(mask)
        for kind in ("rows", "columns", "blocks"):
            if f"{module}.{kind}.index" not in adapter:
                continue
            index, delta = adapter[f"{module}.{kind}.index"], adapter[f"{module}.{kind}.delta"]
            if kind == "rows":
                whole[index] += delta
            elif kind == "columns":
                whole[:, index] += delta
            else:
                size = delta.shape[-1]
                for (row, column), block in zip(index.tolist(), delta, strict=True):
                    whole[row * size : (row + 1) * size, column * size : (column + 1) * size] += block
        found[name] = whole
    return found


def oracle(objective: str, masks: dict[str, torch.Tensor], rows: list[int], folder: Path) -> Any:
    """TRL's own trainer on a dense model of which only the masked entries get a gradient, on the records in the order
    that a run took them: the trained model, and TRL's log."""
    own = OBJECTIVES[objective]
    model, data = base(), records()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in masks)
        if name in masks:
            parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    if objective == "kto":
        both = [(data[at // 2], at % 2 == 0) for at in range(2 * len(data))]  # as they are laid out: one of each kind
        data = [{"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
                for pair, good in both]  # fmt: skip
    arguments = own.configuration()(
        str(folder), use_cpu=True, bf16=False, report_to=[], max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION, learning_rate=RATE, logging_steps=1, disable_tqdm=True,
        save_strategy="no", max_length=512, gradient_checkpointing=False, train_sampling_strategy="sequential",
        warmup_steps=0, **SPECIAL.get(objective, {}),
    )  # fmt: skip
    more = {"ref_model": base()} if own.reference else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
    if not own.reference:
        tokenizer.bos_token = None  # which these put before every prompt, also where the tokenizer itself does not
    trainer = own.trainer()(
        model, args=arguments, train_dataset=Dataset.from_list([data[row] for row in rows]),
        processing_class=tokenizer, **more,
    )  # fmt: skip
    trainer.train()
    return model, [line for line in trainer.state.log_history if "loss" in line]


SPECIAL = {
    "ipo": {"loss_type": ["ipo"]},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the training data in the order in which a run takes them."""
    seen: list[int] = []
    own = batches.Collator.__call__

    def collate(self: Any, rows: Any) -> Any:
        seen.extend(row[ROW] for row in rows)
        return own(self, rows)

    monkeypatch.setattr(batches.Collator, "__call__", collate)
    return seen


@pytest.mark.parametrize(
    ("objective", "method"),
    [("dpo", "s2ft"), ("dpo", "sylva"), ("ipo", "s2ft"), ("kto", "s2ft"), ("orpo", "sylva"), ("simpo", "s2ft")],
)
def test_what_is_learnt_is_what_trl_learns(
    objective: str, method: str, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SETTINGS, *METHODS[method], f"objective={objective}", "dataset.eval_path=null", "dataset.eval_fraction=0",
             f"dataset.train_path={BUNDLED_ROOT / 'data/preference/train.jsonl'}"]  # fmt: skip
    sparseft(tmp_path, "train", *words, "output_dir=run")
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    mirror, log = oracle(objective, pattern_of(adapter, base()), taken, tmp_path / "trl")
    plain = dict(base().named_parameters())
    for name, found in learnt(adapter, base()).items():
        expected = mirror.get_parameter(name).detach() - plain[name].detach()
        assert expected.abs().max() > RATE
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    lines = metrics(tmp_path / "run")
    assert len(lines) == len(log) == STEPS
    for ours, theirs in zip(lines, log, strict=True):
        names = [name for name in theirs if name.startswith(("rewards/", "logps/"))]
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= {*names} <= ours.keys()
        for name in ("loss", "grad_norm", *names):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        found = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(found[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))


def by_hand(adapter: Path, beta: float = 0.1) -> tuple[float, float]:
    """Margin and accuracy of DPO's rewards on the held-out pairs: one answer after the other, of the adapter as anyone
    loads it and of a base of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
    if (adapter / "config.json").exists():
        trained = transformers.AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    else:
        trained = load_adapter(base(), adapter)
    plain, margins = base(), []
    for pair in records("eval"):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        rewards = []
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id]
            rewards.append(beta * (log_probability(trained, prompt, answer) - log_probability(plain, prompt, answer)))
        margins.append(rewards[0] - rewards[1])
    return sum(margins) / len(margins), sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.parametrize(
    "method",
    ["s2ft", "lora", "full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "paca", "losia"))],
)
def test_the_reference_of_each_method_is_its_base(method: str, tmp_path: Path) -> None:
    """In batches of five, of which the last one has four pairs."""
    words = [word for word in SETTINGS if not word.startswith("trainer.batch_size")]
    sizes = [] if method == "full" else ["sparsity=0.9"]
    done = sparseft(
        tmp_path, "train", *words, f"method={method}", *sizes, "objective=dpo", "output_dir=run",
        "trainer.batch_size=5", "--json",
    )  # fmt: skip
    margin, accuracy = by_hand(tmp_path / "run/adapter")
    assert done.json["eval_margin_after"] == pytest.approx(margin, rel=1e-3, abs=1e-5) and margin > 0.05
    assert done.json["eval_accuracy_after"] == pytest.approx(accuracy)
    assert done.json["objective"] == "dpo" and done.json["eval_margin_before"] == pytest.approx(0.0, abs=1e-6)
    assert ("second copy of the model" in done.err) is (method == "full")
    assert not (tmp_path / "run/checkpoints/README.md").exists()  # TRL's model card


@pytest.mark.parametrize(("objective", "method"), [("dpo", "s2ft"), ("simpo", "lora")])
def test_an_interrupted_run_ends_as_one_that_never_stopped(
    objective: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SETTINGS, f"objective={objective}", f"method={method}", "sparsity=0.9", "trainer.max_steps=6",
             "trainer.logging_steps=4", "trainer.eval_steps=2", "trainer.save_total_limit=1"]  # fmt: skip
    sparseft(tmp_path, "train", *words, "output_dir=whole")
    own, batches_seen = batches.Collator.__call__, 0

    def collate(self: Any, rows: Any) -> Any:
        nonlocal batches_seen
        batches_seen += len(self.examples.parts[0]) > rows[0][ROW]  # not those of an evaluation
        if batches_seen == 2 * ACCUMULATION + 2:  # of the third step, between two lines of metrics
            signal.raise_signal(signal.SIGINT)
        return own(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(batches.Collator, "__call__", collate)
        sparseft(tmp_path, "train", *words, "output_dir=run", code=130)
    stopped = [line["step"] for line in metrics(tmp_path / "run")]
    assert stopped and max(stopped) < 4
    sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto")
    same_end(tmp_path / "run", tmp_path / "whole")
    for ours, whole in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        names = [name for name in whole if "rewards/" in name or "logps/" in name]
        assert names and {name: ours[name] for name in names} == {name: whole[name] for name in names}
    ends = [summary(tmp_path / name) for name in ("run", "whole")]
    assert len({end["eval_margin_after"] for end in ends}) == 1


def test_of_a_bf16_model_the_logarithms_are_fp32(tmp_path: Path) -> None:
    words = [word for word in SETTINGS if not word.startswith("model.dtype")]
    found = [
        sparseft(
            tmp_path, "train", *words, "objective=simpo", "method=s2ft", f"model.dtype={dtype}", f"output_dir={dtype}",
            "trainer.max_steps=1", "--json",
        ).json["eval_margin_before"]
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=5e-3) and (found[1] * 1024) % 1 != 0


def test_kto_takes_answers_for_themselves_and_pairs(tmp_path: Path) -> None:
    lines = [{"prompt": pair["prompt"], "completion": pair["chosen" if at % 3 else "rejected"], "label": at % 3 > 0}
             for at, pair in enumerate(records())]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [*SETTINGS, "objective=kto", "method=s2ft", "dataset.train_path=answers.jsonl", "dataset.eval_fraction=0.2"]
    done = sparseft(tmp_path, "train", *words, "output_dir=run", "--json")
    assert done.json["eval_margin_after"] > 0.01 and done.json["eval_accuracy_after"] is None
    words[-2] = "dataset.train_path=null"
    assert sparseft(tmp_path, "train", *words, "output_dir=paired", "--json").json["eval_margin_after"] > 0.01
    assert refused(
        tmp_path, "train", *[w.replace("=kto", "=dpo") for w in words], "dataset.train_path=answers.jsonl"
    ) == (
        "objective=dpo: answers.jsonl has one answer a prompt (prompt, completion, label), and dpo compares two "
        "(prompt, chosen, rejected); objective=kto takes them."
    )


def test_a_mismatched_answer_is_that_of_the_example_before() -> None:
    found = [{"prompt_ids": [at], "completion_ids": [10 + at], "label": True} for at in range(3)]
    assert [each["KL_completion_ids"] for each in batches.mismatched(found)] == [[12], [10], [11]]


def test_a_last_answer_alone_is_mismatched_with_another() -> None:
    """Its own would say that the model has not moved, whatever it has learnt."""
    good = TokenizedDataset.from_lists([([5, 10 + at], [IGNORED, 10 + at]) for at in range(3)])
    bad = TokenizedDataset.from_lists([([5, 20 + at], [IGNORED, 20 + at]) for at in range(2)])
    examples = batches.Examples(Preferences(False, good, bad), Preferences(False, good, bad))
    for first in (0, 5):
        for place in range(first, first + 5):
            (seen,) = batches.mismatched_in(examples, [place])
            assert seen["completion_ids"] == examples[place]["completion_ids"] != seen["KL_completion_ids"]


@pytest.mark.parametrize("paired", [True, False])
def test_rows_that_data_are_lengthened_by_count_for_nothing(paired: bool) -> None:
    sides = [TokenizedDataset.from_lists([([5, 6 + at], [IGNORED, 6 + at]) for at in range(3)]) for _ in range(2)]
    collate = batches.Collator(batches.Examples(Preferences(paired, *sides)), list)
    collate.form = lambda found: {"found": found}
    filler = PaddedDataset(Tokenised.of(Preferences(paired, *sides)), 8)[7]
    mixed, whole, empty = collate([{ROW: 1}, filler]), collate([{ROW: 1}]), collate([filler, filler])
    assert mixed == whole and mixed[PLACES] == [1] and mixed[COUNT] > mixed[LEARNT] > 0
    assert (empty[PLACES], empty[COUNT], empty[LEARNT]) == ([], 0, 0) and len(empty["found"]) == 1


def test_both_kinds_are_spread_evenly() -> None:
    assert batches.interleaved(3, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert batches.interleaved(4, 2).tolist() == [0, 4, 1, 2, 5, 3]
    assert batches.interleaved(2, 0).tolist() == [0, 1]


def test_a_prompt_is_what_two_answers_have_in_common() -> None:
    better = TokenizedDataset.from_lists([([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8])])
    worse = TokenizedDataset.from_lists([([5, 9, 4], [IGNORED, IGNORED, 4])])
    assert batches.pair(better, worse, 0) == {"prompt_ids": [5], "chosen_ids": [6, 7, 8], "rejected_ids": [9, 4]}


def test_over_a_packed_base_what_trains_stays_fp32(tmp_path: Path) -> None:
    """TRL would make it bf16 where bitsandbytes has packed the base in four bits."""
    model = sparseft_package.attach(quantize(base()), sparseft_package.S2FTConfig(sparsity=0.9, importance="random"))
    model.is_loaded_in_4bit = True
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
    config = compose("train", ["objective=dpo", "hardware=cpu", "trainer.max_steps=1"])
    data = data_of(replace(config, cache_dir=str(tmp_path)), tokenizer)
    own = OBJECTIVES["dpo"]
    arguments = training_arguments(
        config.trainer, config.hardware, seed=0, device=torch.device("cpu"), total_steps=1, kind=own.configuration(),
        **own.arguments(config.trainer, 0),
    )  # fmt: skip
    trainer = make_trainer(config, model, arguments, data, tokenizer, 0, run=tmp_path)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert {p.data_ptr() for p in trained} == {
        p.data_ptr() for p in sparseft_package.trainable_parameters(model).values()
    }
