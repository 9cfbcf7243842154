"""Evaluation: prompts byte for byte, verdicts by hand, MMLU's accuracy against the model's own logits."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sparseft.config import EvalConfig
from sparseft.data.prompts import alpaca_prompt
from sparseft.errors import UserError
from sparseft.evaluation.llm_adapters import extract, is_correct, last_number
from sparseft.evaluation.mmlu import MMLU_SUBJECTS
from sparseft.evaluation.results import write_results
from sparseft.evaluation.run import evaluate, prepare
from sparseft.evaluation.tasks import expand_tasks
from support.places import SHARED


def tiny_llama(tokenizer: Any, context: int = 4096, seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_llama(tokenizer)


QUESTIONS = {
    ("anatomy", "dev"): 'Dev one?,a1,b1,c1,d1,B\n"Dev ""two"",\nsecond line?",NA,0.10,"c, 2",d2,D\n',
    ("anatomy", "test"): "Test one? ,w,x,y,z,A\nTest two?,p,q,r,s,C\nTest three?,k,l,m,n,D\n",
    ("anatomy", "val"): "Val one?,w,x,y,z,B\n",
    ("high_school_physics", "dev"): "Dev?,a,b,c,d,A\nDev two?,e,f,g,h,C\n",
    ("high_school_physics", "test"): "Is it?,yes,no,maybe,never,B\n",
}
PROMPT = (
    "The following are multiple choice questions (with answers) about anatomy.\n\n"
    "Dev one?\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer: B\n\n"
    'Dev "two",\nsecond line?\nA. NA\nB. 0.10\nC. c, 2\nD. d2\nAnswer: D\n\n'
    "Test one?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
)


@pytest.fixture
def mmlu_folder(tmp_path: Path) -> Path:
    for (subject, split), text in QUESTIONS.items():
        folder = tmp_path / "data" / "mmlu" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")
    return tmp_path / "data"


def write_records(path: Path, records: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [{"instruction": text, "input": "", "output": "", "answer": answer} for text, answer in records]
    path.write_text(json.dumps(content), encoding="utf-8")


def scores_by_hand(
    model: Any, tokenizer: Any, prompt: str, choices: list[str], dtype: torch.dtype | None = None
) -> list[float]:
    """Log-likelihoods of the choices after the prompt, one plain forward pass each."""
    context = tokenizer(prompt).input_ids
    scores = []
    for choice in choices:
        ids = tokenizer(prompt + choice).input_ids
        assert ids[: len(context)] == context
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1, dtype=dtype)
        scores.append(sum(logits[at - 1, ids[at]].item() for at in range(len(context), len(ids))))
    return scores


def scored(model: Any, tokenizer: Any, tasks: list[str], config: EvalConfig, data_dir: Path, **options: Any) -> Any:
    return evaluate(model, tokenizer, prepare(tasks, config, data_dir=str(data_dir)), **options)


# MMLU


def test_mmlu_agrees_with_the_logits(model: Any, tokenizer: Any, mmlu_folder: Path) -> None:
    """Oracle: plain forward passes, one sequence at a time. Batches of 3 mix lengths, so padding would show."""
    config = EvalConfig(shots=2, batch_size=3)
    outcome = scored(model, tokenizer, ["mmlu"], config, data_dir=str(mmlu_folder))
    records = outcome["samples"]["mmlu_anatomy"] + outcome["samples"]["mmlu_high_school_physics"]
    assert records[0]["prompt"] == PROMPT
    correct = {"mmlu_anatomy": [], "mmlu_high_school_physics": []}
    for record, target in zip(records, "ACDB", strict=True):
        expected = scores_by_hand(model, tokenizer, record["prompt"], [" A", " B", " C", " D"])
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        answer = "ABCD"[int(np.argmax(expected))]
        assert (record["answer"], record["target"]) == (answer, target)
        assert record["correct"] == (answer == target)
        correct[record["task"]].append(answer == target)
    for name, verdicts in correct.items():
        assert outcome["tasks"][name]["accuracy"] == pytest.approx(np.mean(verdicts))
        assert outcome["tasks"][name]["samples"] == len(verdicts)
    entry = outcome["tasks"]["mmlu"]
    assert entry["accuracy"] == pytest.approx(np.mean(sum(correct.values(), [])))
    assert entry["accuracy_micro"] == pytest.approx(entry["accuracy"])
    assert entry["accuracy_macro"] == pytest.approx(np.mean([np.mean(item) for item in correct.values()]))
    assert entry["shots"] == 2 and entry["samples"] == 4 and entry["truncated"] == 0
    assert len(entry["missing"]) == 55 and "virology" in entry["missing"]
    assert outcome["tasks"]["mmlu_stem"]["samples"] == 4
    # One sample has no standard error, and neither has a group with such a member: null, not "N/A".
    assert outcome["tasks"]["mmlu_high_school_physics"]["stderr"] is None and entry["stderr"] is None
    deviation = np.std(correct["mmlu_anatomy"], ddof=1) / np.sqrt(3)
    assert outcome["tasks"]["mmlu_anatomy"]["stderr"] == pytest.approx(deviation)


def test_log_likelihoods_of_a_bf16_model_keep_fp32s_places(tokenizer: Any, mmlu_folder: Path) -> None:
    """Rounded to bf16, answers tie that the logits tell apart."""
    model = tiny_llama(tokenizer).bfloat16()
    outcome = scored(model, tokenizer, ["mmlu_anatomy"], EvalConfig(shots=0, batch_size=1), data_dir=str(mmlu_folder))
    for record in outcome["samples"]["mmlu_anatomy"]:
        found = torch.tensor(record["loglikelihoods"])
        assert (found != found.bfloat16().float()).any()
        expected = scores_by_hand(model, tokenizer, record["prompt"], [" A", " B", " C", " D"], torch.float32)
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)


def test_mmlu_groups_weigh_as_they_say(tokenizer: Any, mmlu_folder: Path) -> None:
    """A model that always says A: anatomy 1 of 3, physics 0 of 1, so micro 1/4 and macro 1/6."""
    outcome = scored(
        Says(tokenizer, {}, choice=" A"), tokenizer, ["mmlu"], EvalConfig(shots=1), data_dir=str(mmlu_folder)
    )
    entry = outcome["tasks"]["mmlu"]
    assert (entry["accuracy"], entry["accuracy_micro"], entry["accuracy_macro"]) == (0.25, 0.25, pytest.approx(1 / 6))


def test_mmlu_without_shots_and_on_the_validation_split(model: Any, tokenizer: Any, mmlu_folder: Path) -> None:
    config = EvalConfig(shots=0, split="validation")
    outcome = scored(model, tokenizer, ["mmlu_anatomy"], config, data_dir=str(mmlu_folder / "mmlu"))
    (record,) = outcome["samples"]["mmlu_anatomy"]
    assert record["prompt"] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Val one?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert outcome["tasks"]["mmlu_anatomy"]["shots"] == 0
    assert outcome["tasks"]["mmlu_anatomy"]["split"] == "validation"


def test_mmlu_counts_prompts_that_do_not_fit(tokenizer: Any, mmlu_folder: Path) -> None:
    prompts = [
        record["prompt"]
        for record in scored(
            tiny_llama(tokenizer), tokenizer, ["mmlu"], EvalConfig(shots=2), data_dir=str(mmlu_folder)
        )["samples"]["mmlu_anatomy"]
    ]
    lengths = sorted(len(tokenizer(prompt).input_ids) for prompt in prompts)
    # The longest continuation counts (" B" is two tokens here), and its last token is not read.
    extra = max(len(tokenizer(choice).input_ids) for choice in (" A", " B", " C", " D")) - 1
    for context, expected in ((lengths[0] + extra, 2), (lengths[0] + extra - 1, 3), (lengths[2] + extra, 0)):
        model = tiny_llama(tokenizer, context=context)
        outcome = scored(model, tokenizer, ["mmlu_anatomy"], EvalConfig(shots=2), data_dir=str(mmlu_folder))
        assert outcome["tasks"]["mmlu_anatomy"]["truncated"] == expected
        assert len(outcome["warnings"]) == (expected > 0)
        if expected:
            assert f"{expected} of 3 prompts" in outcome["warnings"][0] and str(context) in outcome["warnings"][0]
    bounded = scored(
        tiny_llama(tokenizer),
        tokenizer,
        ["mmlu_anatomy"],
        EvalConfig(shots=2),
        data_dir=str(mmlu_folder),
        max_length=50,
    )
    assert bounded["tasks"]["mmlu_anatomy"]["truncated"] == 3 and bounded["max_length"] == 50


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shots": 3}, "shots=3.*anatomy_dev.csv has 2"),
        ({"split": "train"}, "train.*test, validation"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"limit": 0}, "eval.limit=0"),
        ({"batch_size": "big"}, "eval.batch_size=big"),
    ],
)
def test_mmlu_settings_refused(mmlu_folder: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        prepare(["mmlu_anatomy"], EvalConfig(**{"shots": 1, **settings}), data_dir=str(mmlu_folder))


def test_mmlu_data_that_is_missing_or_bad(mmlu_folder: Path, tmp_path: Path) -> None:
    config = EvalConfig(shots=1)
    (mmlu_folder / "mmlu" / "val" / "anatomy_val.csv").unlink()
    with pytest.raises(UserError, match="'validation'.*Splits there: test"):
        prepare(["mmlu"], EvalConfig(split="validation"), data_dir=str(mmlu_folder))
    with pytest.raises(UserError, match="mmlu_virology.*Available: mmlu_anatomy, mmlu_high_school_physics"):
        prepare(["mmlu_virology"], config, data_dir=str(mmlu_folder))
    with pytest.raises(UserError, match="expected dev/, val/ or test/.*does not exist"):
        prepare(["mmlu"], config, data_dir=str(tmp_path / "nowhere"))
    test_file = mmlu_folder / "mmlu" / "test" / "anatomy_test.csv"
    test_file.write_text("One?,a,b,c,d,A\nTwo?,a,b,c,d,E\n")
    with pytest.raises(UserError, match="anatomy_test.csv, line 2: expected question"):
        prepare(["mmlu_anatomy"], config, data_dir=str(mmlu_folder))
    (mmlu_folder / "mmlu" / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match="anatomy_dev.csv.*eval.shots=0"):
        test_file.write_text("One?,a,b,c,d,A\n")
        prepare(["mmlu_anatomy"], config, data_dir=str(mmlu_folder))


def test_mmlu_without_data_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="cais/mmlu.*eval.data_dir=FOLDER"):
        prepare(["mmlu_anatomy"], EvalConfig(), data_dir=None)


# Commonsense and arithmetic


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),  # case matters in the published protocol
        ("boolq", "untrue", "true"),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution3 or solution1", "solution1"),
        ("ARC-Easy", "the correct answer is answer5", "answer5"),
        ("ARC-Challenge", "answer6", None),
        ("winogrande", "option2option1", "option2"),
        ("hellaswag", "ending4", "ending4"),
        ("social_i_qa", "", None),
        ("AQuA", "The answer is (D).", "D"),
        ("AQuA", "Because of C", "B"),  # the first capital A to E, as published
        ("AQuA", "no capitals", None),
        ("gsm8k", "The answer is 1,234.", 1234.0),
        ("gsm8k", "It costs $18.", 18.0),
        ("gsm8k", "12 - 5 = 7 apples", 7.0),
        ("SVAMP", "so -3.5", -3.5),
        ("AddSub", "-$1,000.25.", -1000.25),
        ("mawps", "3.", 3.0),
        ("SingleEq", "none at all", None),
        ("MultiArith", "9" * 400, float("inf")),
    ],
)
def test_extracted_answer(task: str, text: str, answer: str | float | None) -> None:
    assert extract(task, text) == answer


@pytest.mark.parametrize(
    ("answer", "label", "verdict"),
    [
        (8.0, "8.0", True),
        (8.0009, "8.0", True),
        (8.002, "8.0", False),
        (-8.0, "8.0", False),
        (float("inf"), "8.0", False),
        (None, "8.0", False),
        ("answer1", "answer1", True),
        ("answer1", "answer2", False),
    ],
)
def test_verdict(answer: str | float | None, label: str, verdict: bool) -> None:
    assert is_correct(answer, label) is verdict


def test_last_number_takes_no_digits_of_other_scripts() -> None:
    assert last_number("٣") is None


class Says:
    """Wraps a tiny model so that it says a given text after each prompt, or always prefers one choice."""

    def __new__(cls, tokenizer: Any, answers: dict[str, str], choice: str | None = None) -> Any:
        model = tiny_llama(tokenizer)
        calls: list[dict[str, Any]] = []  # the settings of each call

        def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
            calls.append(settings)
            rows = []
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                said = answers[tokenizer.decode(ids[mask.bool()])]
                rows.append([*tokenizer(said).input_ids, tokenizer.eos_token_id])
            width = max(map(len, rows))
            padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

        model.generate = generate
        model.calls = calls
        if choice is not None:
            token = tokenizer(choice).input_ids[-1]
            model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([token]), 100.0))
        return model


def test_commonsense_and_arithmetic_by_hand(tokenizer: Any, tmp_path: Path) -> None:
    data = {
        "boolq": [("Is it?", "true", "the correct answer is true"), ("Was it?", "false", "true, surely")],
        "commonsense/ARC-Easy": [("Which?", "answer3", "answer3</s> answer1"), ("What?", "answer1", "no idea")],
        "piqa": [("How?", "solution1", "solution1\n### Instruction:\nsolution2")],
        "arithmetic/gsm8k": [("Sum?", "1234.0", "The answer is 1,234."), ("Cost?", "5", "")],
        "AQuA": [("Pick (A) 1 (B) 2", "B", "The answer is B")],
    }
    answers = {}
    for place, rows in data.items():
        write_records(tmp_path / place / "test.json", [(text, label) for text, label, _ in rows])
        answers |= {alpaca_prompt(text): said for text, _, said in rows}
    model = Says(tokenizer, answers)
    outcome = scored(model, tokenizer, ["commonsense", "arithmetic"], EvalConfig(batch_size=2), data_dir=str(tmp_path))
    tasks = outcome["tasks"]
    by_hand = {"boolq": 0.5, "ARC-Easy": 0.5, "piqa": 1.0, "gsm8k": 0.5, "AQuA": 1.0}
    assert {name: tasks[name]["accuracy"] for name in by_hand} == by_hand
    assert tasks["commonsense"]["accuracy"] == pytest.approx(2 / 3)  # macro
    assert tasks["commonsense"]["accuracy_micro"] == pytest.approx(3 / 5)
    assert tasks["arithmetic"]["accuracy"] == pytest.approx(3 / 4)
    assert tasks["commonsense"]["no_answer"] == tasks["ARC-Easy"]["no_answer"] == 1
    assert tasks["gsm8k"]["no_answer"] == 1 and tasks["boolq"]["no_answer"] == 0
    assert tasks["commonsense"]["missing"] == ["social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "openbookqa"]
    assert sum("openbookqa" in warning for warning in outcome["warnings"]) == 1
    record = outcome["samples"]["piqa"][0]
    assert (record["answer"], record["target"], record["correct"]) == ("solution1", "solution1", True)
    assert record["response"] == "solution1\n"  # what follows the stop text is cut
    assert record["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHow?\n\n### Response:\n"
    )
    # The reasoning of arithmetic needs more room than the default; greedy, whatever the model's own settings say.
    lengths = {call["max_new_tokens"] for call in model.calls}
    assert lengths == {32, 256} and all(call["do_sample"] is False for call in model.calls)


def test_the_digest_tells_changed_questions(tmp_path: Path) -> None:
    def digest(*records: tuple[str, str]) -> str:
        write_records(tmp_path / "gsm8k" / "test.json", list(records))
        return prepare(["gsm8k"], EvalConfig(), data_dir=str(tmp_path)).digest()

    first = digest(("How many?", "1"))
    assert first == digest(("How many?", "1"))
    assert len({first, digest(("How many?", "2")), digest(("How many now?", "1"))}) == 3


@pytest.mark.parametrize(("asked", "tokens"), [(None, 256), (32, 32), (300, 300)])
def test_tokens_of_an_answer_are_the_tasks_own_or_those_asked_for(
    asked: int | None, tokens: int, tmp_path: Path
) -> None:
    write_records(tmp_path / "gsm8k" / "test.json", [("How many?", "1")])
    plan = prepare(["gsm8k"], EvalConfig(max_new_tokens=asked), data_dir=str(tmp_path))
    assert plan.tasks["gsm8k"].get_config("generation_kwargs")["max_gen_toks"] == tokens


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_batches_is_generation_alone(tokenizer: Any, tmp_path: Path, beams: int) -> None:
    """Oracle: `generate` on each prompt alone, without padding and without lm-eval. The tokenizer has no pad token."""
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    questions = ["Is it?", "Why is the answer to a longer question longer?", "Who?", "And this one?"]
    write_records(tmp_path / "boolq" / "test.json", [(text, "true") for text in questions])
    model = tiny_llama(tokenizer, seed=3)
    config = EvalConfig(batch_size=3, num_beams=beams, max_new_tokens=9)
    outcome = scored(model, bare, ["boolq"], config, data_dir=str(tmp_path))
    assert bare.pad_token is None
    for text, record in zip(questions, outcome["samples"]["boolq"], strict=True):
        ids = tokenizer(alpaca_prompt(text), return_tensors="pt").input_ids
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=beams, do_sample=False
        )
        assert record["response"] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_models_own_generation_settings_change_no_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Lm-eval's own tasks take them, also those that need the tokenizer."""
    write_records(tmp_path / "boolq" / "test.json", [(text, "true") for text in ("Is it?", "Why is it so?")])
    plan = prepare(["boolq"], EvalConfig(max_new_tokens=24), data_dir=str(tmp_path))
    model = tiny_llama(tokenizer, seed=3)

    def responses() -> list[str]:
        (records,) = evaluate(model, tokenizer, plan)["samples"].values()
        return [record["response"] for record in records]

    plain = responses()
    own = model.generation_config = transformers.GenerationConfig(
        no_repeat_ngram_size=1, min_new_tokens=20, stop_strings=[plain[0][:2]], eos_token_id=tokenizer.eos_token_id
    )
    before = own.to_dict()
    assert responses() == plain
    plan.harness_tasks, plan.tasks, plan.requested = plan.tasks, {}, ["lm_eval:boolq"]
    assert responses() != plain
    assert model.generation_config is own and own.to_dict() == before


def test_long_prompts_keep_room_for_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Prompts that leave less than the wanted 256 tokens generate fewer; only one that leaves under 32 is cut."""
    write_records(tmp_path / "gsm8k" / "test.json", [("short?", "1"), ("x" * 150, "1"), ("y" * 350, "1")])
    model = tiny_llama(tokenizer, context=480)
    seen: list[tuple[int, int]] = []

    def generate(input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        seen.append((input_ids.shape[1], max_new_tokens))
        return torch.cat([input_ids, torch.full((len(input_ids), 1), tokenizer.eos_token_id)], dim=1)

    model.generate = generate
    outcome = scored(model, tokenizer, ["gsm8k"], EvalConfig(batch_size=8), data_dir=str(tmp_path))
    lengths = [len(tokenizer(record["prompt"]).input_ids) for record in outcome["samples"]["gsm8k"]]
    assert lengths[0] + 256 <= 480 and 480 - 256 < lengths[1] < 480 - 32 < lengths[2]  # the three cases
    assert [record["truncated"] for record in outcome["samples"]["gsm8k"]] == [False, False, True]
    assert outcome["tasks"]["gsm8k"]["truncated"] == 1
    expected = [(lengths[0], 256), (lengths[1], (480 - lengths[1]) // 32 * 32), (480 - 32, 32)]
    assert sorted(seen) == sorted(expected)


def test_stop_text_ends_rows_one_by_one(tokenizer: Any) -> None:
    from sparseft.evaluation.harness import StopAt

    stop = StopAt(["### Instruction"], tokenizer, prompt_length=20)
    prompt = tokenizer("### Instruction").input_ids  # in the prompt it does not count
    prompt += [3] * (20 - len(prompt))
    said = [tokenizer(text).input_ids for text in ("ok ### Instruction", "### Instructive")]
    width = max(map(len, said))
    rows = torch.tensor([prompt + [3] * (width - len(row)) + row for row in said])
    assert stop(rows, None).tolist() == [True, False]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([("q", "answer9")], "record 1: the answer 'answer9'"),
        ([("q", "true"), ("q", "maybe")], "record 2.*boolq"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, records: list[tuple[str, str]], expected: str) -> None:
    write_records(tmp_path / "boolq" / "test.json", records)
    with pytest.raises(UserError, match=expected):
        prepare(["boolq"], EvalConfig(), data_dir=str(tmp_path))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    write_records(tmp_path / "commonsense" / "boolq" / "test.json", [("q", "true")])
    with pytest.raises(UserError, match="No validation data of 'boolq'.*validation.json or val.json.*there: test"):
        prepare(["boolq"], EvalConfig(split="validation"), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="No test data of 'arithmetic'.*<arithmetic task>/test.json"):
        prepare(["arithmetic"], EvalConfig(), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="eval.data_dir=FOLDER"):
        prepare(["boolq"], EvalConfig(), data_dir=None)
    with pytest.raises(UserError, match="shots=2.*boolq is defined without shots"):
        prepare(["boolq"], EvalConfig(shots=2), data_dir=str(tmp_path))
    (tmp_path / "commonsense" / "boolq" / "val.json").write_text('[{"instruction": "q"}]')
    with pytest.raises(UserError, match="val.json, record 1: expected an object with 'instruction'"):
        prepare(["boolq"], EvalConfig(split="validation"), data_dir=str(tmp_path))
    (tmp_path / "commonsense" / "boolq" / "val.json").write_text("[{")
    with pytest.raises(UserError, match="val.json is not JSON"):
        prepare(["boolq"], EvalConfig(split="validation"), data_dir=str(tmp_path))


# Names


def test_own_names() -> None:
    names = expand_tasks(["mmlu", "boolq,gsm8k", "mmlu_virology", "boolq", "arithmetic"])
    assert names == ["mmlu", "boolq", "gsm8k", "mmlu_virology", "arithmetic"]


def test_names_of_lm_eval(tmp_path: Path) -> None:
    assert expand_tasks(["lm_eval:boolq", "boolq", "lm_eval:lambada_openai"]) == [
        "lm_eval:boolq",
        "boolq",
        "lambada_openai",
    ]
    assert {"arc_easy", "arc_challenge"} == set(expand_tasks(["ai2_arc"]))  # a tag: its tasks
    for word, meant in (("bolq", "boolq"), ("mmlu_viroligy", "mmlu_virology"), ("lm_eval:hellaswg", "hellaswag")):
        with pytest.raises(UserError, match=f"Unknown task '{word}'. Did you mean '{meant}'"):
            expand_tasks([word])
    with pytest.raises(UserError, match="Unknown task 'qqqqqqqqqq'. Available: mmlu, commonsense, arithmetic"):
        expand_tasks(["qqqqqqqqqq"])
    with pytest.raises(UserError, match="No task"):
        expand_tasks([" , "])


def test_subjects_of_a_folder_count(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "dragon_lore_test.csv").write_text("Q?,a,b,c,d,A\n")
    assert expand_tasks(["mmlu_dragon_lore"], data_dir=str(tmp_path)) == ["mmlu_dragon_lore"]
    plan = prepare(["mmlu"], EvalConfig(shots=0), data_dir=str(tmp_path))
    assert list(plan.tasks) == ["mmlu_dragon_lore"] and not plan.warnings
    assert "missing" not in plan.facts["mmlu"]  # a set of its own, not an incomplete MMLU


def test_lm_evals_own_task_of_the_same_name(model: Any, tokenizer: Any, mmlu_folder: Path, tmp_path: Path) -> None:
    """Both stand side by side, lm-eval's under its prefix."""
    from lm_eval.api.task import ConfigurableTask

    from sparseft.evaluation.mmlu import build_task

    write_records(tmp_path / "boolq" / "test.json", [("Is it?", "true")])
    plan = prepare(["boolq"], EvalConfig(limit=2), data_dir=str(tmp_path))
    theirs = build_task("anatomy", "test", 0, str(mmlu_folder))
    assert isinstance(theirs, ConfigurableTask)
    theirs.set_config("task", "boolq")
    plan.harness_tasks["boolq"] = theirs
    plan.requested.append("lm_eval:boolq")
    outcome = evaluate(model, tokenizer, plan)
    assert outcome["tasks"]["boolq"]["samples"] == 1
    assert outcome["tasks"]["lm_eval:boolq"]["samples"] == 2
    assert {path.name for path in write_results(tmp_path, outcome, {})} == {
        "boolq.json",
        "boolq.samples.jsonl",
        "lm_eval_boolq.json",
        "lm_eval_boolq.samples.jsonl",
    }


def test_every_evaluation_draws_the_same_shots(model: Any, tokenizer: Any, mmlu_folder: Path) -> None:
    """A plan serves base and adapter, whose answers are compared prompt by prompt: lm-eval's sampler draws on."""
    import inspect

    import lm_eval
    from lm_eval.api.samplers import ContextSampler
    from lm_eval.evaluator import evaluate as evaluate_theirs

    from sparseft.evaluation.harness import LanguageModel
    from sparseft.evaluation.mmlu import build_task

    lines = "".join(f"Dev {number}?,a,b,c,d,A\n" for number in range(12))
    (mmlu_folder / "mmlu" / "dev" / "anatomy_dev.csv").write_text(lines)

    def drawing() -> Any:
        task = build_task("anatomy", "test", 12, str(mmlu_folder))
        task.set_config("num_fewshot", 3)
        task.sampler = ContextSampler(list(task.fewshot_docs()))
        return task

    def planned() -> Any:
        plan = prepare(["mmlu_anatomy"], EvalConfig(shots=1), data_dir=str(mmlu_folder))
        plan.tasks = {"mmlu_anatomy": drawing()}
        return plan

    def prompts(plan: Any) -> list[str]:
        return [record["prompt"] for record in evaluate(model, tokenizer, plan)["samples"]["mmlu_anatomy"]]

    plan = planned()
    first = prompts(plan)
    assert len(set(first)) == 3 and first == prompts(plan) == prompts(planned())

    task = drawing()
    task.set_fewshot_seed(inspect.signature(lm_eval.simple_evaluate).parameters["fewshot_random_seed"].default)
    lm = LanguageModel(model, tokenizer, 8, None)
    raw = evaluate_theirs(lm=lm, task_dict={"tasks": {"mmlu_anatomy": task}, "groups": {}}, log_samples=True)
    theirs = raw["samples"]["mmlu_anatomy"]
    assert [sample["arguments"][0][0] for sample in sorted(theirs, key=lambda each: each["doc_id"])] == first


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuations_are_scored_without_the_logits_of_what_is_before(
    model: Any, tokenizer: Any, batch_size: int
) -> None:
    """Token 0, which lm-eval pads with, may be any token of a prompt or an answer."""
    from sparseft.evaluation.harness import LanguageModel

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    asked = [(ids(40), ids(1)), (ids(38), ids(3)), (ids(36), ids(1)), (ids(30), [0, 0, 5]), ([*ids(30), 0, 0], ids(2))]
    asked += [([0], [0, 7]), ([0, 0], [0]), (asked[0][0], ids(1))]  # the last one is looked up with the first
    lm, rows = LanguageModel(model, tokenizer, batch_size, None), []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, logits: rows.append(logits.shape[1]))
    found = lm._loglikelihood_tokens([(None, *each) for each in asked], disable_tqdm=True)
    assert rows == (
        [3, 3, 3, 3, 5, 2] if batch_size == 1 else [7, 33]
    )  # a row of 40 tokens with one of 36, of 33 with 2
    handle.remove()
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(continuation)[:, None]).sum()
        assert value == pytest.approx(float(wanted), abs=1e-4)
        assert greedy == (logits.argmax(1).tolist() == continuation)


# Surroundings


def test_nothing_is_left_changed_and_stdout_is_clean(
    tokenizer: Any, mmlu_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_records(mmlu_folder / "boolq" / "test.json", [("Is it?", "true"), ("Was it?", "false")])
    model = tiny_llama(tokenizer)
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    side = tokenizer.padding_side
    seen: list[tuple[str, int, int | None]] = []
    config = EvalConfig(shots=1, batch_size="auto", limit=2)
    scored(
        model,
        tokenizer,
        ["boolq", "mmlu"],
        config,
        data_dir=str(mmlu_folder),
        progress=lambda *step: seen.append(step),
    )
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False and model.generation_config.use_cache is True
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.padding_side == side
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert ("Running generate_until requests", 2, 2) in seen
    assert any(what == "Running loglikelihood requests" and done == total for what, done, total in seen)


def test_a_tokenizer_that_closes_every_text(model: Any, tokenizer: Any, mmlu_folder: Path) -> None:
    """Prompts stay open where the tokenizer itself appends EOS (Llama's add_eos_token)."""
    from tokenizers.processors import TemplateProcessing

    closing = copy.deepcopy(tokenizer)
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    opening = copy.deepcopy(tokenizer)
    opening.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special[:1])
    outcome = scored(model, closing, ["mmlu_anatomy"], EvalConfig(shots=1), data_dir=str(mmlu_folder))
    for record in outcome["samples"]["mmlu_anatomy"]:
        expected = scores_by_hand(model, opening, record["prompt"], [" A", " B", " C", " D"])
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_without_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.eos_token is None and bare.pad_token is None
    write_records(tmp_path / "boolq" / "test.json", [("Is it?", "true"), ("Was it so?", "false")])
    model = tiny_llama(tokenizer)
    model.generation_config.eos_token_id = None
    outcome = scored(model, bare, ["boolq"], EvalConfig(max_new_tokens=5), data_dir=str(tmp_path))
    for record in outcome["samples"]["boolq"]:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert record["response"] == bare.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_peft_model(tokenizer: Any, mmlu_folder: Path) -> None:
    """An adapter counts: scores equal those of the adapted model's own logits."""
    import peft

    base = tiny_llama(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
        model = peft.get_peft_model(base, config)
    model.train()
    outcome = scored(model, tokenizer, ["mmlu_anatomy"], EvalConfig(shots=1), data_dir=str(mmlu_folder))
    assert model.training
    model.eval()
    for record in outcome["samples"]["mmlu_anatomy"]:
        expected = scores_by_hand(model, tokenizer, record["prompt"], [" A", " B", " C", " D"])
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)


# Files


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_written_files(model: Any, tokenizer: Any, mmlu_folder: Path, tmp_path: Path) -> None:
    write_records(mmlu_folder / "boolq" / "test.json", [("Is it?", "true"), ("Wäre es?", "false")])
    run = tmp_path / "run"
    plan = prepare(["mmlu", "boolq"], EvalConfig(shots=1), data_dir=str(mmlu_folder))
    outcome = evaluate(model, tokenizer, plan)
    outcome["raw"]["results"]["boolq"]["worst"] = None
    header = {"evaluated": "the base model", "commit": "abc", "loss": float("nan"), "path": tmp_path, "call": print}
    paths = write_results(run, outcome, header)
    names = ["mmlu.json", "mmlu.samples.jsonl", "boolq.json", "boolq.samples.jsonl"]
    assert paths == [run / "eval" / name for name in names]
    assert sorted(path.name for path in (run / "eval").iterdir()) == sorted(names)  # nothing left aside
    content = strict((run / "eval" / "mmlu.json").read_text())
    assert content["sparseft"]["evaluated"] == "the base model" and content["sparseft"]["loss"] is None
    assert content["sparseft"]["versions"]["lm_eval"] and content["sparseft"]["path"] == str(tmp_path)
    assert set(content["tasks"]) == {"mmlu", "mmlu_anatomy", "mmlu_high_school_physics"}
    assert content["results"]["mmlu"]["acc,none"] == content["tasks"]["mmlu"]["accuracy"]
    assert content["configs"]["mmlu_anatomy"]["num_fewshot"] == 1
    lines = [strict(line) for line in (run / "eval" / "mmlu.samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["task"] for line in lines} == {"mmlu_anatomy", "mmlu_high_school_physics"}
    assert all({"prompt", "answer", "target", "correct"} <= set(line) for line in lines)
    boolq = strict((run / "eval" / "boolq.json").read_text())
    assert boolq["configs"]["boolq"]["generation_kwargs"]["max_gen_toks"] == 32
    assert "Wäre es?" in (run / "eval" / "boolq.samples.jsonl").read_text(encoding="utf-8")

    # A plan serves again, with the same result; and writing again replaces.
    again = evaluate(model, tokenizer, plan)
    assert again["tasks"] == outcome["tasks"] and again["samples"] == outcome["samples"]
    assert write_results(run, again, header) == paths


# Real data


@pytest.mark.skipif(not (SHARED / "data" / "mmlu").is_dir(), reason="no ../shared/data/mmlu beside the project")
def test_all_57_subjects_load_quickly() -> None:
    import time

    prepare(["mmlu_virology"], EvalConfig(split="validation"), data_dir=str(SHARED / "data"))  # imports
    start = time.process_time()  # of the processor, which other work does not lengthen
    plan = prepare(["mmlu"], EvalConfig(split="validation"), data_dir=str(SHARED / "data"))
    for task in plan.tasks.values():
        task.build_all_requests()
    assert time.process_time() - start < 20
    assert sorted(plan.tasks) == [f"mmlu_{subject}" for subject in MMLU_SUBJECTS]
    assert sum(len(task.eval_docs) for task in plan.tasks.values()) == 1531


@pytest.mark.skipif(not (SHARED / "models" / "stories260k").is_dir(), reason="no ../shared/models/stories260k")
def test_real_model_agrees_with_its_logits() -> None:
    path = SHARED / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tasks = ["mmlu_anatomy", "mmlu_astronomy"]
    config = EvalConfig(split="validation", shots=0, limit=3)
    outcome = scored(model, tokenizer, tasks, config, data_dir=str(SHARED / "data"))
    for name in tasks:
        verdicts = []
        assert outcome["tasks"][name]["truncated"] == 0
        for record in outcome["samples"][name]:
            expected = scores_by_hand(model, tokenizer, record["prompt"], [" A", " B", " C", " D"])
            assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-3)
            verdicts.append("ABCD"[int(np.argmax(expected))] == record["target"])
        assert outcome["tasks"][name]["accuracy"] == pytest.approx(np.mean(verdicts))


def test_a_batch_is_tried_out_by_one_process_on_a_gpu_alone() -> None:
    from types import SimpleNamespace

    from sparseft.evaluation.harness import FIXED_BATCH, settled_batch

    whole, shard = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(0))
    shard.ds_id = 0
    for parameter, device, expected in ((whole, "cuda", "auto"), (shard, "cuda", FIXED_BATCH), (whole, "cpu", 8)):
        there = SimpleNamespace(device=torch.device(device), parameters=lambda own=parameter: iter([own]))
        assert settled_batch("auto", there) == expected and settled_batch(3, there) == 3
