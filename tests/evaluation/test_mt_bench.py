"""MT-Bench: FastChat's questions in, FastChat's answer files out, prompts byte for byte those of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseft.config import EvalConfig
from sparseft.data.prompts import alpaca_prompt
from sparseft.data.records import Records
from sparseft.errors import UserError
from sparseft.evaluation.comparison import compare
from sparseft.evaluation.mt_bench import prompt_of, temperature, write_answers
from sparseft.evaluation.run import evaluate, prepare
from sparseft.evaluation.target import prompt_format
from support.data import convert, convert_messages
from support.running import METHODS, on, refused, sparseft, write_data

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Shorter, please."]},
    {"question_id": 111, "category": "math", "turns": ["3 + 4?", "Twice that?"], "reference": ["7", "14"]},
    {"question_id": 9, "category": "extraction", "turns": ["Who?"]},
]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ '</s>' if message.role == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mt_bench").mkdir()
    text = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "mt_bench" / "question.jsonl").write_text(text + "\n")
    return tmp_path


def _records(items: list[dict[str, Any]]) -> Records:
    return Records(items, "test", numbers=list(range(1, len(items) + 1)))


class Echo:
    """A tiny model whose `generate` says `answer 1`, `answer 2`, … call by call and row by row."""

    def __new__(cls, make_model: Any, tokenizer: Any) -> Any:
        model = make_model("llama", vocab_size=len(tokenizer))
        model.calls = []

        def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
            rows = []
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                model.calls.append((tokenizer.decode(ids[mask.bool()]), settings))
                rows.append(tokenizer(f" answer {len(model.calls)}\n").input_ids + [tokenizer.eos_token_id])
            width = max(map(len, rows))
            padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

        model.generate = generate
        return model


def test_turns_temperatures_and_the_files(folder: Path, make_model: Any, tokenizer: Any) -> None:
    model = Echo(make_model, tokenizer)
    config = EvalConfig(batch_size=1, max_new_tokens=16, prompt="guanaco")
    outcome = evaluate(model, tokenizer, prepare(["mt_bench"], config, data_dir=str(folder)), max_length=128)
    by_prompt = dict(model.calls)
    records = outcome["samples"]["mt_bench"]
    for record, question in zip(records, QUESTIONS, strict=True):
        first = f"### Human: {question['turns'][0]}### Assistant:"
        assert record["prompts"][0] == record["prompt"] == first
        if len(question["turns"]) == 2:  # the second turn sees the first answer, as training would write it
            assert (
                record["prompts"][1] == f"{first} {record['turns'][0]}### Human: {question['turns'][1]}### Assistant:"
            )
            assert record["response"] == f" {record['turns'][0]}\n"
        for prompt in record["prompts"]:
            settings = by_prompt[prompt]
            assert settings["max_new_tokens"] <= 16
            if question["category"] == "writing":
                assert (settings["do_sample"], settings["temperature"], settings["top_k"]) == (True, 0.7, 0)
            else:
                assert settings["do_sample"] is False and "temperature" not in settings
    assert len(model.calls) == 5
    assert outcome["tasks"]["mt_bench"]["accuracy"] is None and outcome["tasks"]["mt_bench"]["samples"] == 3

    path = write_answers(folder / "run", records, "mine")
    assert path == folder / "run" / "eval" / "mt_bench" / "model_answer" / "mine.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [9, 81, 111]
    for line in lines:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "mine" and line["tstamp"] > 1.6e9
        ((index, turns),) = [(choice["index"], choice["turns"]) for choice in line["choices"]]
        question = next(q for q in QUESTIONS if q["question_id"] == line["question_id"])
        assert index == 0 and len(turns) == len(question["turns"]) and all(turn.startswith("answer") for turn in turns)
    assert len({line["answer_id"] for line in lines}) == 3
    compare(outcome, outcome)  # nothing to compare, and nothing breaks
    assert "difference" not in outcome["tasks"]["mt_bench"]


def test_fastchats_temperatures() -> None:
    assert [temperature({"category": name}) for name in ("roleplay", "coding", "stem", "else")] == [0.7, 0.0, 0.1, 0.7]


def test_prompts_are_those_of_training(tokenizer: Any) -> None:
    """Oracle: the segments that training masks, for every format; each ends where the answer begins."""
    asked, said = ["Why?", "And then?"], [" because", " that"]
    rendered = {format: prompt_of(format, tokenizer)[1] for format in ("alpaca", "guanaco", "messages")}
    assert rendered["alpaca"](asked[:1], []) == alpaca_prompt("Why?")
    record = {"instruction": "Why?", "input": "", "output": "because"}
    (example,) = convert(_records([record]), "alpaca")
    assert example.segments[0] == (rendered["alpaca"](asked[:1], []), False)
    text = f"### Human: Why?### Assistant:{said[0]}### Human: And then?### Assistant:{said[1]}"
    (example,) = convert(_records([{"text": text}]), "guanaco")
    joined = "".join(part for part, _ in example.segments[:3])
    assert example.segments[0][0] == rendered["guanaco"](asked[:1], [])
    # A generated answer may have no space before it (Llama's decoders strip one), and line breaks behind it.
    assert [rendered["guanaco"](asked, [each]) for each in (" because", "because", "because\n\n")] == [joined] * 3

    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    name, chat = prompt_of("auto", chatty)
    assert name == "chat" and prompt_of("auto", tokenizer)[0] == "alpaca"
    messages = [{"role": role, "content": content} for role, content in
                zip(("user", "assistant") * 2, ("Why?", "because", "And then?", "that"), strict=True)]  # fmt: skip
    (example,), _ = convert_messages(_records([{"messages": messages}]), chatty)
    assert example.segments[0][0] == chat(asked[:1], [])
    assert "".join(part for part, _ in example.segments[:3]) == chat(asked, said[:1])
    assert prompt_of("messages", chatty)[0] == "chat" and prompt_of("messages", tokenizer)[0] == "plain"
    (example,), _ = convert_messages(_records([{"messages": messages}]), tokenizer)
    assert "".join(part for part, _ in example.segments[:3]) == rendered["messages"](asked, said[:1])
    with pytest.raises(UserError, match="eval.prompt=chat: the tokenizer has no chat template"):
        prompt_of("chat", tokenizer)


def test_an_answer_in_the_chat_form_ends_with_the_turn(folder: Path, make_model: Any, tokenizer: Any) -> None:
    """Training ends an answer with the template's mark, and puts no EOS behind it."""
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chatty.chat_template = TEMPLATE.replace("</s>", "<|im_end|>")
    mark = chatty.convert_tokens_to_ids("<|im_end|>")
    for prompt, ends in (("chat", [tokenizer.eos_token_id, mark]), ("alpaca", [tokenizer.eos_token_id])):
        model = Echo(make_model, chatty)
        plan = prepare(["mt_bench"], EvalConfig(max_new_tokens=16, prompt=prompt), data_dir=str(folder))
        evaluate(model, chatty, plan)
        assert [settings["eos_token_id"] for _, settings in model.calls] == [ends] * 5


def test_a_second_bos_is_not_written(tokenizer: Any) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ bos_token }}" + TEMPLATE
    _, chat = prompt_of("chat", chatty)
    assert chat(["Why?"], []) == "<s><user>Why?<assistant>"  # this tokenizer adds none by itself
    chatty.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert chat(["Why?"], []) == "<user>Why?<assistant>"


def test_prompts_have_the_ids_of_training_where_the_beginning_of_a_text_is_tokenised_otherwise() -> None:
    """A tokenizer that puts `▁` at the beginning of a text, but not behind the BOS that the template writes."""
    from tokenizers.pre_tokenizers import Metaspace

    from support.data import make_tokenizer

    chatty = make_tokenizer("metaspace")
    chatty.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=True)
    chatty.chat_template = "{{ bos_token }}" + TEMPLATE
    _, chat = prompt_of("chat", chatty)
    text = chat(["Why?"], [])
    expected = chatty.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=False
    )
    assert chatty(text, add_special_tokens=not text.startswith("<s>")).input_ids == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1 is not JSON"),
        ('{"question_id": 1, "turns": []}', "line 1: expected an object with 'question_id' and 'turns'"),
        ('{"question_id": 1, "turns": ["a"]}\n{"turns": ["a"]}', "line 2: expected"),
        ("\n", "holds no question"),
    ],
)
def test_questions_that_are_bad(folder: Path, text: str, expected: str) -> None:
    (folder / "mt_bench" / "question.jsonl").write_text(text)
    with pytest.raises(UserError, match=expected):
        prepare(["mt_bench"], EvalConfig(), data_dir=str(folder))


def test_questions_that_are_missing(tmp_path: Path) -> None:
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(UserError, match="question.jsonl"):
            prepare(["mt_bench"], EvalConfig(), data_dir=data_dir)
    assert "eval.prompt=alpca" in refused(tmp_path, "eval", "mt_bench", "--base", "eval.prompt=alpca")


def test_the_command_answers_as_the_run_was_trained(folder: Path, model_folder: Any) -> None:
    """A run on guanaco conversations gets guanaco prompts; the base answers the same ones, in a file of its own."""
    data = write_data(folder)
    words = [*on(model_folder(), data["oasst1"], "oasst1"), *METHODS["s2ft"], "trainer.max_steps=2"]
    sparseft(folder, "train", *words, "output_dir=run")
    settings = [f"eval.data_dir={folder}", "eval.max_new_tokens=3"]
    done = sparseft(folder, "eval", "mt_bench", "--run=run", "--limit=2", *settings, "--json").json
    assert done["tasks"]["mt_bench"]["samples"] == 2
    place = folder / "run" / "eval" / "mt_bench" / "model_answer"
    assert {path.name for path in place.iterdir()} == {"run.jsonl", f"{model_folder().name}.jsonl"}
    assert {str(path.relative_to(folder)) for path in place.iterdir()} <= set(done["files"])
    stored = [
        json.loads(line) for line in (folder / "run" / "eval" / "mt_bench.samples.jsonl").read_text().splitlines()
    ]
    assert stored[0]["prompt"] == "### Human: Write a line.### Assistant:" and "base" in stored[0]
    (folder / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 8
    )
    words = [*on(model_folder(), folder / "chat.jsonl"), *METHODS["s2ft"], "trainer.max_steps=1"]
    sparseft(folder, "train", *words, "output_dir=plain")  # whose tokenizer has no template
    sparseft(folder, "eval", "mt_bench", "--run=plain", "--limit=1", *settings, "eval.compare_base=false")
    (line,) = (folder / "plain" / "eval" / "mt_bench.samples.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "User: Write a line.\n\nAssistant:"
    table = sparseft(folder, "eval", "mt_bench", "--run=run", *settings, "eval.compare_base=false",
                     "eval.model_id=my model", "eval.prompt=alpaca").out  # fmt: skip
    assert "mt_bench" in table and (place / "my_model.jsonl").is_file()


def test_chats_that_were_learnt_as_plain_text_are_asked_as_such(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"data": {"format": "messages"}}))
    assert prompt_format("auto", tmp_path) == "messages"
    (tmp_path / "config.yaml").write_text("dataset: {plain_chat: true}\n")
    assert prompt_format("auto", tmp_path) == "plain" and prompt_format("chat", tmp_path) == "chat"
    assert prompt_of("plain", tokenizer)[1](["Why?"], []) == "User: Why?\n\nAssistant:"
