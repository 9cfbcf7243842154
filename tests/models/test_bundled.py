"""The bundled tiny model and its data: they load, keep their formats and sizes, and the model knows its world."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
import warnings
from collections import Counter

import pytest

from sparseft.data.prompts import ASSISTANT, HUMAN, alpaca_prompt, mmlu_header, mmlu_question
from support.places import ROOT

BUNDLED = ROOT / "sparseft" / "bundled"
TINY, DATA = BUNDLED / "tiny", BUNDLED / "data"
COMMONSENSE = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
ARITHMETIC = ("gsm8k", "AddSub", "AQuA")
SUBJECTS = ("invented_creatures", "invented_plants", "invented_machines", "arithmetic_in_words")


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def generators():
    """The scripts that made the data: (tiny_world, tiny_text, tiny_data, tiny_skills)."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        yield tuple(importlib.import_module(name) for name in ("tiny_world", "tiny_text", "tiny_data", "tiny_skills"))
    finally:
        sys.path.remove(folder)


def records(name: str) -> list[dict[str, str]]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def mmlu(split: str, subject: str) -> list[list[str]]:
    with (DATA / "mmlu" / split / f"{subject}_{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# The model


def test_model_is_a_small_grouped_query_llama_in_bf16(tiny):
    import torch

    model, tokenizer = tiny
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 850_000 <= sum(p.numel() for p in model.parameters()) <= 1_200_000
    config = model.config
    assert 0 < config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert config.max_position_embeddings == 512
    assert config.vocab_size == len(tokenizer)
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        assert number == getattr(config, f"{name}_token_id") == getattr(model.generation_config, f"{name}_token_id")


def test_folder_keeps_its_size_and_its_files():
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) <= 4 * 1024**2
    names = {p.name for p in TINY.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello world",
        "  two  spaces \n\n\tand a tab ",
        "naïve café, Straße, 東京, Привет, עברית",
        "emoji 🙂👩‍👩‍👧 and a zero\u200bwidth",
        "1234567890 3.14 -7",
        "it 's , un-cleaned . do n't !",
        '{"json": [1, 2]} <s not special>',
        "\x00\x01\u007f\ufeff",
    ],
)
def test_any_text_comes_back(tiny, text):
    assert tiny[1].decode(tiny[1].encode(text)) == text


def test_prompts_are_short_in_tokens(tiny):
    """What the quickstart's speed rests on: a word or two a token in the prompts."""
    _, tokenizer = tiny
    longest = max(
        len(tokenizer.encode(alpaca_prompt(r["instruction"]) + r["output"])) for r in records("commonsense/train.json")
    )
    assert longest <= 128
    for split in ("val", "test"):
        for subject in SUBJECTS:
            shots = [mmlu_question(q, c) + f" {a}\n\n" for q, *c, a in mmlu("dev", subject)]
            for question, *choices, _ in mmlu(split, subject):
                prompt = mmlu_header(subject) + "".join(shots) + mmlu_question(question, choices)
                assert len(tokenizer.encode(prompt)) <= 256
    assert [len(tokenizer.encode(f" {letter}")) for letter in "ABCD"] == [1] * 4


# The data


@pytest.mark.parametrize("family", ["commonsense", "arithmetic"])
def test_records_have_exactly_the_four_fields(family):
    tasks = COMMONSENSE if family == "commonsense" else ARITHMETIC
    paths = [f"{family}/train.json", *(f"{family}/{task}/test.json" for task in tasks)]
    assert {p.relative_to(DATA).as_posix() for p in (DATA / family).rglob("*.json")} == set(paths)
    for path in paths:
        for record in records(path):
            assert list(record) == ["instruction", "input", "output", "answer"]
            assert record["input"] == "" and all(isinstance(value, str) for value in record.values())


FORMS = {
    "boolq": r"Please answer the following question with true or false, question: [a-z].*\?\n\n"
    r"Answer format: true/false",
    "piqa": r"Please choose the correct solution to the question: .+\n\nSolution1: .+\n\nSolution2: .+\n\n"
    r"Answer format: solution1/solution2",
    "ARC-Easy": r"Please choose the correct answer to the question: .+\?\n\n"
    r"Answer1: .+\. Answer2: .+\. Answer3: .+\. Answer4: .+\.\n\nAnswer format: answer1/answer2/answer3/answer4",
    "openbookqa": r"Please choose the correct answer to the question: .+\n\n"
    r"Answer1: .+ Answer2: .+ Answer3: .+ Answer4: .+\n\nAnswer format: answer1/answer2/answer3/answer4",
}


@pytest.mark.parametrize("task", COMMONSENSE)
def test_commonsense_is_worded_as_the_public_sets_and_balanced(task):
    tests = records(f"commonsense/{task}/test.json")
    assert len(tests) == (42 if len(COMMONSENSE[task]) == 2 else 52)
    for record in tests:
        assert re.fullmatch(FORMS[task], record["instruction"])
        assert record["output"] == f"the correct answer is {record['answer']}"
    counts = Counter(record["answer"] for record in tests)
    assert set(counts) == set(COMMONSENSE[task])
    assert max(counts.values()) == min(counts.values())  # a constant guess scores chance


def test_commonsense_training_mixes_all_tasks():
    train = records("commonsense/train.json")
    for task in COMMONSENSE:
        assert sum(bool(re.fullmatch(FORMS[task], r["instruction"])) for r in train) >= 99
    first = [task for r in train[:40] for task in COMMONSENSE if re.fullmatch(FORMS[task], r["instruction"])]
    assert set(first) == set(COMMONSENSE)


def test_public_wording(request):
    """The same patterns hold for the public sets, where they lie beside the project."""
    shared = ROOT.parent / "shared" / "data" / "commonsense"
    if not shared.is_dir():
        pytest.skip("the public sets are not there")
    for task in COMMONSENSE:
        start, end = FORMS[task].split(": ")[0], FORMS[task].split("\n")[-1].rsplit("Answer format", 1)[-1]
        for record in json.loads((shared / task / "test.json").read_text(encoding="utf-8"))[:20]:
            assert record["instruction"].startswith(start) and record["instruction"].endswith(end)


@pytest.mark.parametrize("task", ARITHMETIC)
def test_arithmetic_answers_are_right(task):
    """Recomputes every rationale and, for AQuA, looks the letter up among the choices."""
    for record in records(f"arithmetic/{task}/test.json"):
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", record["output"])
        assert len(steps) == (2 if task == "gsm8k" else 1)
        for a, sign, b, result in steps:
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        final = steps[-1][3]
        numbers = re.findall(r"\d+", record["instruction"].split(" Answer Choices")[0])
        assert [steps[0][0], *(step[2] for step in steps)] == numbers
        if task == "AQuA":
            choices = dict(re.findall(r"\(([A-E])\) (\d+)", record["instruction"]))
            assert list(choices) == list("ABCDE") and len(set(choices.values())) == 5
            assert choices[record["answer"]] == final
            assert record["output"].endswith(f"The answer is ({record['answer']}).")
        else:
            assert record["answer"] == f"{final}.0"
            assert record["output"].endswith(f" The answer is {final}.")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_mmlu_files(subject):
    for split, low, high in (("dev", 5, 5), ("val", 20, 20), ("test", 60, 100)):
        rows = mmlu(split, subject)
        assert low <= len(rows) <= high
        for question, *choices, answer in rows:
            assert question and len(set(choices)) == 4 and answer in "ABCD"
    counts = Counter(row[-1] for row in mmlu("test", subject))
    assert max(counts.values()) <= 0.5 * counts.total()


def test_dialogues_and_paragraphs():
    for split, low in (("train", 250), ("eval", 40)):
        lines = (DATA / "oasst1" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) >= low
        for line in lines:
            record = json.loads(line)
            assert list(record) == ["text"]
            assert re.fullmatch(rf"({HUMAN} [^#]+{ASSISTANT} [^#]+)+", record["text"])
        paragraphs = (DATA / "text" / f"{split}.txt").read_text(encoding="utf-8").strip().split("\n\n")
        assert len(paragraphs) >= min(low, 40) and all(p == p.strip() and "\n" not in p for p in paragraphs)


def test_no_test_question_is_in_a_training_file():
    for family, tasks in (("commonsense", COMMONSENSE), ("arithmetic", ARITHMETIC)):
        trained = {record["instruction"] for record in records(f"{family}/train.json")}
        asked = [r["instruction"] for task in tasks for r in records(f"{family}/{task}/test.json")]
        assert len(asked) == len(set(asked)) and not trained & set(asked)
    for subject in SUBJECTS:
        questions = {split: {row[0] for row in mmlu(split, subject)} for split in ("dev", "val", "test")}
        assert not questions["dev"] & questions["test"] and not questions["val"] & questions["test"]
    for name, gap in (("oasst1/{}.jsonl", "\n"), ("text/{}.txt", "\n\n")):
        pieces = [set((DATA / name.format(s)).read_text(encoding="utf-8").split(gap)) - {""} for s in ("train", "eval")]
        assert not pieces[0] & pieces[1]


def test_commonsense_tests_ask_for_other_facts_than_the_training(generators):
    """Which fact a record asks for is told by its thing and by what is asked of it."""
    world, _, _, _ = generators
    made = world.make_world(0)
    held = {(fact.thing, fact.property.name) for fact in made.facts if fact.held}
    assert len(held) == 5 / 16 * len(made.facts)
    for path in ("commonsense/train.json", *(f"commonsense/{task}/test.json" for task in COMMONSENSE)):
        for record in records(path):
            (asked,) = {(f.thing, f.property.name) for f in made.facts if asks_for(record["instruction"], f)}
            assert (asked in held) != path.endswith("train.json"), record["instruction"]


def asks_for(instruction: str, fact) -> bool:
    """Whether the instruction is about this thing and lists (or, by yes and no, asks for) this property's values."""
    if not re.search(rf"\b{fact.thing}\b", instruction):
        return False
    if "true or false" in instruction:
        return fact.property.is_switch and f" {fact.property.values[0]}?" in instruction
    choices, _ = fact.choices()
    return all(re.search(rf"(Solution|Answer)\d: (.* )?{choice}\b", instruction) for choice in choices)


def test_the_scripts_write_the_bundled_data_again(generators):
    world, _, data, _ = generators
    made = data.files(world.make_world(0))
    assert set(made) == {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file()}
    for name, content in made.items():
        assert (DATA / name).read_bytes() == content.encode(), name
    assert data.files(world.make_world(1)) != made


def test_base_text_is_seeded_and_never_shows_the_new_skill(generators):
    import itertools

    world, text, _, _ = generators
    made = world.make_world(0)
    first, again, other = ([d.text for d in itertools.islice(text.documents(made, seed), 2000)] for seed in (0, 0, 1))
    assert first == again and first != other
    told = "\n".join(first)
    assert "### Instruction" not in told and "correct answer is" not in told


# The skill


def test_base_knows_its_world_well_above_chance(tiny, generators):
    world, _, _, skills = generators
    measured = skills.measure(*tiny, world.make_world(0), limit=24)
    del measured["counting stories"]  # which it did not learn: `docs/tiny-model.md`
    for name, (accuracy, chance, _) in measured.items():
        assert accuracy >= chance + 0.25, (name, accuracy, chance)


def test_base_answers_the_bundled_mmlu(tiny):
    import torch

    model, tokenizer = tiny
    letters = [tokenizer.encode(f" {letter}")[0] for letter in "ABCD"]
    right = total = 0
    for subject in SUBJECTS:
        shots = "".join(mmlu_question(q, c) + f" {a}\n\n" for q, *c, a in mmlu("dev", subject))
        for question, *choices, answer in mmlu("test", subject)[:20]:
            prompt = mmlu_header(subject) + shots + mmlu_question(question, choices)
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1, letters]
            right += "ABCD"[int(logits.argmax())] == answer
            total += 1
    assert right / total >= 0.55


def test_base_does_not_know_the_new_skill(tiny):
    """Commonsense answers in their format are what the quickstart teaches."""
    import torch

    model, tokenizer = tiny
    hits = 0
    tests = [r for task in COMMONSENSE for r in records(f"commonsense/{task}/test.json")[:4]]
    for record in tests:
        ids = torch.tensor([tokenizer.encode(alpaca_prompt(record["instruction"]))])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found = re.findall(r"true|false|(?:answer|solution|option)\d", tokenizer.decode(made[0, ids.shape[1] :]))
        hits += bool(found) and found[0] == record["answer"]
    assert hits / len(tests) <= 0.3
