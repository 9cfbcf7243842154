"""Preference records to pairs of examples, beside the tokens that TRL makes of them; and what is wrong with others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset

from sparseft.config import BUNDLED_ROOT, DatasetConfig
from sparseft.data import preferences, token_cache
from sparseft.data.loaded import LoadedData
from sparseft.data.loading import load_preferences
from sparseft.data.tokenized import IGNORED
from sparseft.errors import UserError

CHATML = (
    "{% if tools %}<s>TOOLS {{ tools | length }}\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")


@pytest.fixture(scope="module")
def chatting(tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHATML
    return found


def load(folder: Path, records: list[Any], tokenizer: Any, objective: str = "dpo", **settings: Any) -> LoadedData:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DatasetConfig(**{"train_path": str(path), "eval_fraction": 0.0, **settings})
    return load_preferences(
        config, tokenizer, objective=objective, max_length=64, seed=0, bundled=True, cache_dir=folder / "cache"
    )


def text(example: dict[str, list[int]], tokenizer: Any, learnt: bool = False) -> str:
    ids = [
        i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED or not learnt
    ]
    return tokenizer.decode(ids)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


PLAIN = [{"prompt": f"{at} is\n", "chosen": f"a number, {at}.", "rejected": "no."} for at in range(5)]
CHATS = [{"prompt": [user(f"{at}?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]} for at in range(5)]
SHAPES = {  # the same chat, as data sets spell it
    "as HH-RLHF has it": {"chosen": "\n\nHuman: a?\n\nAssistant: yes", "rejected": "\n\nHuman: a?\n\nAssistant:  no"},
    "and with an empty prompt": {
        "prompt": "",
        "chosen": "\n\nHuman: a?\n\nAssistant: yes",
        "rejected": "\n\nHuman: a?\n\nAssistant: no",
    },
    "apart": {"prompt": [user("a?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    "in front of both": {"chosen": [user("a?"), assistant("yes")], "rejected": [user("a?"), assistant("no")]},
    "and as a list": {
        "prompt": [user("a?")],
        "chosen": [user("a?"), assistant("yes")],
        "rejected": [user("a?"), assistant("no")],
    },
    "and as text": {
        "prompt": "a?",
        "chosen": [user("a?"), assistant("yes")],
        "rejected": [user("a?"), assistant("no")],
    },
    "as text alone": {"prompt": "a?", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
}


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
WITH_TOOLS = [chat | {"tools": TOOLS} for chat in CHATS]


@pytest.mark.parametrize("records", [PLAIN, CHATS, WITH_TOOLS], ids=["texts", "chats", "tools"])
def test_the_tokens_are_trls(records: list[Any], chatting: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    found = load(tmp_path, records, chatting).preferences
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny")
    arguments = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=64)
    theirs = trl.DPOTrainer(
        model, ref_model=copy.deepcopy(model), args=arguments, train_dataset=Dataset.from_list(records),
        processing_class=chatting,
    ).train_dataset  # fmt: skip
    assert found is not None and len(found) == len(theirs) == 5
    for better, worse, row in zip(found.better, found.worse, theirs, strict=True):
        for side, example in (("chosen", better), ("rejected", worse)):
            answer = row[f"{side}_ids"]
            assert example["input_ids"] == row["prompt_ids"] + answer
            assert [label for label in example["labels"] if label != IGNORED] == answer


@pytest.mark.parametrize("shape", list(SHAPES))
def test_ways_to_spell_a_chat(shape: str, chatting: Any, tmp_path: Path) -> None:
    found = load(tmp_path, [SHAPES[shape]], chatting).preferences
    assert found is not None
    assert text(found.better[0], chatting) == "<s>user\na?</s>\n<s>assistant\nyes</s>\n"
    assert text(found.worse[0], chatting, learnt=True) == "no</s>\n"


def test_what_stands_beside_a_chat_is_read_and_all_else_counted(chatting: Any, tmp_path: Path) -> None:
    given = {"system": "Be brief.", "tools": TOOLS, "source": "mine", "empty": ""}
    found = load(tmp_path, [CHATS[0] | given, CHATS[1]], chatting)
    assert found.preferences is not None
    for side in (found.preferences.better, found.preferences.worse):
        assert text(side[0], chatting).startswith("<s>TOOLS 1\n<s>system\nBe brief.</s>\n<s>user\n0?</s>")
    assert [note for note in found.notes if "not used" in note] == [
        "messages rendered with the tokenizer's chat template; field 'source' of 1 record is not used"
    ]
    answers = [{"prompt": [user("a")], "completion": [assistant("b")], "label": label} for label in (True, False)]
    found = load(tmp_path, [each | given for each in answers], chatting, "kto")
    assert found.preferences is not None and "Be brief." in text(found.preferences.worse[0], chatting)
    texts = load(tmp_path, [PLAIN[0] | given, PLAIN[1]], chatting)
    said = "fields 'system' of 1 record, 'tools' of 1 record, 'source' of 1 record are not used"
    assert texts.notes.count(said) == 1


def test_earlier_answers_are_part_of_the_prompt(chatting: Any, tmp_path: Path) -> None:
    before = [user("a?"), assistant("b") | {"weight": 1}, user("c?")]
    record = {"prompt": before, "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    found = load(tmp_path, [record], chatting).preferences
    assert found is not None and text(found.better[0], chatting, learnt=True) == "yes</s>\n"
    assert text(found.better[0], chatting).startswith("<s>user\na?</s>\n<s>assistant\nb</s>")


def test_without_a_template_chats_are_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    found = load(tmp_path, CHATS, tokenizer)
    assert found.preferences is not None and "Assistant: yes" in text(found.preferences.better[0], tokenizer)
    assert any("the tokenizer has no chat template" in note for note in found.notes)


def test_answers_for_themselves(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"{at}\n", "completion": "yes" if at % 3 else "no", "label": at % 3 > 0} for at in range(7)]
    found = load(tmp_path, records, tokenizer, "kto").preferences
    assert found is not None and not found.paired and (len(found.better), len(found.worse), len(found)) == (4, 3, 7)
    assert {text(each, tokenizer, learnt=True) for each in found.better} == {"yes</s>"}
    as_pairs = load(tmp_path, PLAIN, tokenizer, "kto").preferences
    assert as_pairs is not None and not as_pairs.paired and len(as_pairs) == 10


@pytest.mark.parametrize("key", ["chosen", "rejected"])
@pytest.mark.parametrize("pair", [PLAIN[0], CHATS[0]], ids=["texts", "chats"])
def test_a_pair_with_an_empty_answer_is_left_out_and_said(pair: Any, key: str, chatting: Any, tmp_path: Path) -> None:
    for nothing in (" " if pair is PLAIN[0] else [assistant(" ")], None):
        found = load(tmp_path, [pair, pair | {key: nothing}], chatting)
        assert found.preferences is not None and len(found.preferences) == 1
        (warning,) = found.warnings
        assert warning.startswith("1 record left out: ") and "is empty (first: " in warning and "line 2" in warning


def test_a_pair_stays_together(tokenizer: Any, tmp_path: Path) -> None:
    """Also where one answer falls away, and in a split."""
    records = [
        *PLAIN,
        {"prompt": "word " * 80, "chosen": "a", "rejected": "b"},
        PLAIN[0] | {"rejected": PLAIN[0]["chosen"]},
    ]
    found = load(tmp_path, records, tokenizer, too_long="drop", eval_fraction=0.4)
    assert found.preferences is not None and found.eval_preferences is not None
    assert (len(found.preferences), len(found.eval_preferences)) == (3, 2)
    seen = set()
    for part in (found.preferences, found.eval_preferences):
        for better, worse in zip(part.better, part.worse, strict=True):
            prompt = text(better, tokenizer).split("\n")[0]
            assert text(worse, tokenizer).split("\n")[0] == prompt
            seen.add(prompt)
    assert len(seen) == 5
    assert "1 pair left out: both answers are the same" in " ".join(found.notes)
    again = load(tmp_path, records, tokenizer, too_long="drop", eval_fraction=0.4)
    assert again.fingerprint == found.fingerprint and any("cached" in note for note in again.notes)


def test_pairs_with_one_first_question_go_to_one_side(tokenizer: Any, tmp_path: Path) -> None:
    records = [
        {
            "prompt": [user(f"root {tree}"), assistant("yes"), user(f"and {n} of {tree}")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        }
        for n in range(4)
        for tree in range(8)
    ]
    found = load(tmp_path, records, tokenizer, eval_fraction=0.25)
    assert found.preferences is not None and found.eval_preferences is not None
    assert (len(found.preferences), len(found.eval_preferences), found.eval_overlap) == (24, 8, 0)


GOOD = PLAIN[0]
OTHERS = [user("c"), assistant("d")]
WRONG = [
    ({"prompt": "a", "chosen": "b"}, "line 2: the preference record lacks 'rejected' (it has: chosen, prompt)."),
    ({"prompt": "a", "chosen": "b", "rejcted": "c"}, "prompt, rejcted). 'rejcted': Did you mean 'rejected'?"),
    (GOOD | {"chosen": 3}, "line 2: 'chosen' must be text or a list of messages, not a number."),
    (GOOD | {"chosen": OTHERS}, "'chosen' is a list and 'rejected' text; both are texts, or both lists of messages."),
    ({"chosen": "b", "rejected": "c"}, "line 2: 'prompt' is missing."),
    (GOOD | {"prompt": [user("a")]}, "line 2: 'prompt' must be text as 'chosen' is, not a list."),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": OTHERS},
        "line 2: no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages.",
    ),
    (
        {"chosen": OTHERS[:1], "rejected": OTHERS},
        "line 2: 'chosen' has no message behind those that it shares with the other answer.",
    ),
    (
        CHATS[0] | {"chosen": [{"role": "asistant", "content": "x"}]},
        "line 2, message 2: the role is 'asistant'. Did you mean 'assistant'?",
    ),
]


@pytest.mark.parametrize(("record", "expected"), WRONG)
def test_a_bad_record_is_named(record: Any, expected: str, chatting: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, [GOOD, record], chatting)
    assert expected in str(caught.value)


@pytest.mark.parametrize("label", ["yes", None, 2])
def test_a_label_is_true_or_false(label: Any, tokenizer: Any, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(UserError, match=r"line 2: 'label' is .*; expected true \(a good answer\) or false\."):
        load(tmp_path, [good, good | {"label": label}], tokenizer, "kto")
    with pytest.raises(UserError, match=r"all answers are good ones \(no label is false\); expected both\."):
        load(tmp_path, [good, good], tokenizer, "kto")


@pytest.mark.parametrize("good", ["True", "true", "1", "1.0"])
def test_labels_of_a_csv_file_are_text(good: str, tokenizer: Any, tmp_path: Path) -> None:
    bad = {"True": "False", "true": "false", "1": "0", "1.0": "0.0"}[good]
    path = tmp_path / "answers.csv"
    path.write_text(f"prompt,completion,label\na,yes,{good}\nb,no,{bad}\nc,yes,{good}\n")
    found = load(tmp_path, [], tokenizer, "kto", train_path=str(path)).preferences
    assert found is not None
    assert [text(each, tokenizer, learnt=True) for each in found.better] == ["yes</s>"] * 2 and len(found.worse) == 1


def test_records_that_say_nothing_of_what_is_better(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not say which answer is better; expected prompt, chosen and rejected"):
        load(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer)
    with pytest.raises(UserError, match=r"dataset\.format=alpaca: not a format of this objective; give preference or"):
        load(tmp_path, PLAIN, tokenizer, format="alpaca")


def test_dialogues_in_texts(tmp_path: Path, chatting: Any) -> None:
    """As HH-RLHF has them, some of which end with a question or an empty answer; text that only mentions a turn is
    none, nor is an answer alone."""
    before = "\n\nHuman: a\n\nb?\n\nAssistant: yes\n\nHuman: why?"
    worse = f"{before}\n\nAssistant: no."
    rows = [{"chosen": f"{before}\n\nAssistant: so {at}.", "rejected": worse} for at in range(3)]
    odd = [{"chosen": before, "rejected": worse}, {"chosen": f"{before}\n\nAssistant: ", "rejected": worse}]
    data = load(tmp_path, [*rows, *odd[1:]], chatting)
    assert data.format == "messages" and len(data.preferences) == 3
    shown = text(data.preferences.better[0], chatting)
    assert "user\na\n\nb?" in shown and "assistant\nyes" in shown and "user\nwhy?" in shown
    assert "so 0." in text(data.preferences.better[0], chatting, learnt=True)
    assert "yes" not in text(data.preferences.better[0], chatting, learnt=True)
    with pytest.raises(UserError, match="records.jsonl, line 4: 'chosen' has no message behind"):
        load(tmp_path, [*rows, odd[0]], chatting)
    mentioned = {"prompt": "What is\n", "chosen": "Human: a\n\nAssistant: b", "rejected": "no"}
    assert load(tmp_path, [mentioned], chatting).format == "prompt_completion"
    answers = load(tmp_path, [{"prompt": "", "chosen": "Assistant: b", "rejected": "Assistant: c"}], chatting)
    assert answers.format == "prompt_completion"
    assert "user" not in text(answers.preferences.better[0], chatting)


def test_tokens_from_before_dialogues_in_texts_were_read_are_not_used(
    tmp_path: Path, chatting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SHAPES["and with an empty prompt"]
    with monkeypatch.context() as before:
        before.setattr(token_cache, "LAYOUT", "6")
        before.setattr(preferences, "_in_messages", lambda item: item)
        assert load(tmp_path, [record], chatting).format == "prompt_completion"
    found = load(tmp_path, [record], chatting).preferences
    assert found is not None and text(found.better[0], chatting, learnt=True) == "yes</s>\n"
