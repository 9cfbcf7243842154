"""`sparseft eval preference`: against log-probabilities one answer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparseft.adapters.lifecycle import load_adapter
from sparseft.compose.run_config import compose, to_yaml
from sparseft.config import BUNDLED_ROOT
from sparseft.data.tokenized import TokenizedDataset
from sparseft.evaluation.preference import log_probabilities, settings
from sparseft.models.decoder import last_logits
from support.running import refused, sparseft

PAIRS = [json.loads(line) for line in (BUNDLED_ROOT / "data/preference/eval.jsonl").read_text().splitlines()]


def by_hand(model: Any) -> list[list[float]]:
    """Of each pair the log-probabilities of both answers, and their means over tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
    found = []
    for pair in PAIRS:
        row = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer(pair["prompt"])["input_ids"]
            answer = [*tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
            total = sum(logits[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
            row += [total, total / len(answer)]
        found.append(row)
    return found


def test_base_and_adapter_are_asked_the_runs_held_out_pairs(tmp_path: Path) -> None:
    words = ["trainer.max_steps=4", "trainer.batch_size=4", "trainer.learning_rate=2e-2", "trainer.warmup_steps=0"]
    words += ["trainer.gradient_accumulation=2", "model.dtype=float32", "hardware=cpu"]
    sparseft(tmp_path, "train", "objective=simpo", "method=s2ft", "sparsity=0.9", *words, "output_dir=run")
    found = sparseft(tmp_path, "eval", "preference", "--run", "run", "eval.batch_size=5", "--json").json
    entry = found["tasks"]["preference"]
    base = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny", dtype=torch.float32)
    plain = by_hand(base)
    trained = by_hand(load_adapter(base, tmp_path / "run/adapter"))
    assert entry["samples"] == len(PAIRS) == 24
    assert entry["accuracy"] == sum(row[0] > row[2] for row in trained) / 24
    assert entry["base"] == sum(row[0] > row[2] for row in plain) / 24
    assert entry["metrics"]["acc_norm,none"] == sum(row[1] > row[3] for row in trained) / 24
    margin = sum(row[0] - row[2] for row in trained) / 24
    assert entry["metrics"]["margin,none"] == pytest.approx(margin, rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run/eval/preference.samples.jsonl").read_text().splitlines()]
    for line, pair, now, before in zip(lines, PAIRS, trained, plain, strict=True):
        assert line["prompt"] == pair["prompt"] and line["target"] == f"{pair['chosen']}</s>"
        assert line["loglikelihoods"] == pytest.approx([now[0], now[2]], rel=1e-4)
        assert line["base"]["loglikelihoods"] == pytest.approx([before[0], before[2]], rel=1e-4)
    said = refused(tmp_path, "eval", "preference", "--base", "output_dir=run")
    assert said.startswith("output_dir=run: the folder of a run, whose eval/ holds what the run itself has answered")


def test_the_base_alone_and_data_of_ones_own(tmp_path: Path) -> None:
    found = sparseft(tmp_path, "eval", "preference", "--base", "dataset=preference", "eval.limit=3", "--json").json
    assert found["tasks"]["preference"]["samples"] == 3 and "base" not in found["tasks"]["preference"]
    assert "do not say which answer is better" in refused(tmp_path, "eval", "preference", "--base")
    message = refused(tmp_path, "eval", "preference", "--base", "dataset=preference", "dataset.eval_path=no.jsonl")
    assert message.startswith("dataset.eval_path: there is no file 'no.jsonl'")


@pytest.mark.parametrize("words", [[], ["dataset.eval_path=pairs.jsonl"], ["dataset=preference"]])
def test_answers_alone_are_compared_whatever_a_run_has_learnt(words: list[str], tmp_path: Path) -> None:
    """Else the prompt would count in the mean over tokens."""
    config = compose("train", ["dataset.loss_on_prompt=true"], [])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for run in (tmp_path, None):
        assert not settings(config, run, words)[0].dataset.loss_on_prompt
    assert config.dataset.loss_on_prompt


def test_pairs_of_a_file_that_has_changed_since_are_refused(tmp_path: Path) -> None:
    """Split anew, what the run has learnt would count as held out."""
    lines = [json.dumps(pair) + "\n" for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["objective=simpo", "method=s2ft", "hardware=cpu", "dataset=preference", "dataset.train_path=pairs.jsonl"]
    words += ["dataset.eval_path=null", "dataset.eval_fraction=0.25", "trainer.max_steps=1", "trainer.max_length=64"]
    sparseft(tmp_path, "train", *words, "output_dir=run")
    asked = ["eval", "preference", "--run", "run", "eval.compare_base=false"]
    assert sparseft(tmp_path, *asked, "--json").json["tasks"]["preference"]["samples"] == 6
    (tmp_path / "pairs.jsonl").write_text("".join(lines[4:] + lines[:4]))
    message = refused(tmp_path, *asked)
    assert message.startswith("the training examples are not those that the run in ")
    assert "did pairs.jsonl, the tokenizer or the version of sparseft change? Give the data as they were" in message
    assert "or pairs that it has not seen" in message
    (tmp_path / "others.jsonl").write_text("".join(lines[:3]))
    found = sparseft(tmp_path, *asked, "dataset.eval_path=others.jsonl", "--json").json
    assert found["tasks"]["preference"]["samples"] == 3


def test_pairs_in_a_file_of_their_own_need_no_training_data(tmp_path: Path) -> None:
    """Of a run that learnt something else, and of the base; of a run, its prompts are its own."""
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS[:5])
    (tmp_path / "pairs.jsonl").write_text(lines)
    words = ["trainer.max_steps=1", "method=s2ft", "hardware=cpu", "dataset=text", "trainer.max_length=64"]
    sparseft(tmp_path, "train", *words, "output_dir=run")
    path = "dataset.eval_path=pairs.jsonl"
    found = sparseft(tmp_path, "eval", "preference", "--run", "run", path, "--json").json
    assert found["tasks"]["preference"]["samples"] == 5
    alone = sparseft(tmp_path, "eval", "preference", "--base", path, "--json").json
    assert alone["tasks"]["preference"]["accuracy"] == found["tasks"]["preference"]["base"]
    assert refused(tmp_path, "eval", "preference", "--run", "run", "dataset.eval_path=no.jsonl").startswith(
        "dataset.eval_path: there is no file 'no.jsonl'"
    )
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert "has one answer a prompt (prompt, completion, label), expected two" in refused(
        tmp_path, "eval", "preference", "--base", "dataset.eval_path=answers.jsonl"
    )


def test_pairs_left_out_or_cut_are_said(tmp_path: Path) -> None:
    """Of eight pairs two have too long prompts, two too long answers, one of which differ within the length."""
    long = "The olmo runs on milk. " * 200
    pairs = [dict(pair) for pair in PAIRS[:8]]
    pairs[0] |= {"chosen": f"{long} Good.", "rejected": f"{long} Bad."}
    pairs[1] |= {"chosen": f"Good. {long}", "rejected": f"Bad. {long}"}
    for pair in pairs[2:4]:
        pair["prompt"] *= 200
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["eval", "preference", "--base", "dataset.eval_path=pairs.jsonl", "output_dir=out", "--json"]
    found = sparseft(tmp_path, *words, "trainer.max_length=128").json
    assert found["tasks"]["preference"]["samples"] == 5 and found["tasks"]["preference"]["truncated"] == 1
    assert found["warnings"] == [
        "preference: 3 of 8 pairs left out: an answer is empty or does not fit trainer.max_length=128 tokens, or both "
        "are the same.",
        "preference: 1 of 5 pairs had an answer cut at trainer.max_length=128 tokens.",
    ]
    lines = [json.loads(line) for line in (tmp_path / "out/eval/preference.samples.jsonl").read_text().splitlines()]
    assert [line["truncated"] for line in lines] == [True, False, False, False, False]
    assert found["tasks"]["preference"]["accuracy"] == sum(line["correct"] for line in lines) / 5
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    assert refused(tmp_path, *words, "trainer.max_length=128").startswith(
        "preference: the answers of no pair differ within trainer.max_length=128 tokens"
    )


def test_only_answers_have_logits(make_model: Any) -> None:
    model, rows = make_model("llama"), []
    examples = [([3 + n % 50 for n in range(length)], prompt) for length, prompt in ((20, 15), (18, 14), (9, 4))]
    data: Any = TokenizedDataset.from_lists([(ids, [-100] * prompt + ids[prompt:]) for ids, prompt in examples])
    handle = model.lm_head.register_forward_hook(lambda _m, _i, logits: rows.append(logits.shape[1]))
    with torch.no_grad():
        found = log_probabilities(model, data, 3, 2, 0)
        assert rows == [7, 6]  # from the token before the first answer on, padding included
        handle.remove()
        for (value, count), (ids, prompt) in zip(found, examples, strict=True):
            logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].log_softmax(-1)
            wanted = logits.gather(1, torch.tensor(ids[prompt:])[:, None]).sum()
            assert count == len(ids) - prompt and value == pytest.approx(float(wanted), abs=1e-4)


class OwnModel(transformers.PreTrainedModel):
    """A causal LM of somebody's own code, which cannot generate and makes the logits of all tokens."""

    config_class = transformers.LlamaConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: Any, decoder: Any) -> None:
        super().__init__(config)
        self.model, self.lm_head = decoder.model, decoder.lm_head

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **_: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))


def test_a_model_of_own_code_makes_all_logits_and_scores_the_same(make_model: Any, tokenizer: Any) -> None:
    from sparseft.evaluation.harness import LanguageModel

    model = make_model("llama")
    own = OwnModel(model.config, model).eval()
    examples = [([3 + n % 50 for n in range(length)], prompt) for length, prompt in ((20, 15), (9, 4))]
    data: Any = TokenizedDataset.from_lists([(ids, [-100] * prompt + ids[prompt:]) for ids, prompt in examples])
    asked = [(None, ids[:prompt], ids[prompt:]) for ids, prompt in examples]

    def found(each: Any) -> list[Any]:
        harness = LanguageModel(each, tokenizer, 2, None)
        with torch.no_grad():
            pairs = log_probabilities(each, data, 2, 2, 0)
        return [
            *(value for value, _ in pairs),
            *(v for v, _ in harness._loglikelihood_tokens(asked, disable_tqdm=True)),
        ]

    assert found(own) == pytest.approx(found(model), abs=1e-4)
    assert last_logits(own, 2) == {}
    assert last_logits(model, 2) == last_logits(torch.compile(model), 2) == {"logits_to_keep": 2}  # type: ignore[arg-type]
