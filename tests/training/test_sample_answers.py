"""`trainer.sample_prompts`: how prompts are put, what is answered, and that the training does not notice."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparseft.config import DatasetConfig
from sparseft.data.loading import load_datasets
from sparseft.data.prompts import STOPS
from sparseft.errors import UserError
from sparseft.models.decoder import language_model
from sparseft.training import sample_answers
from sparseft.training.average import Average
from sparseft.training.sample_answers import Asked, Prompt, read_prompts
from sparseft.training.trainer import Trainer
from support.running import METHODS, metrics, on, refused, sparseft, summary, write_data
from support.training import attached, same_end

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
QUESTION, ANSWER = "What is 2 + 3?", "it is 5"
USER = {"role": "user", "content": QUESTION}
RECORDS = {
    "alpaca": {"instruction": QUESTION, "output": ANSWER},
    "guanaco": {"text": f"### Human: {QUESTION}### Assistant: {ANSWER}"},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "messages": {"messages": [USER, {"role": "assistant", "content": ANSWER}]},
    "oasst_trees": {
        "message_tree_id": "1",
        "prompt": {
            "role": "prompter",
            "text": QUESTION,
            "replies": [{"role": "assistant", "text": ANSWER, "replies": []}],
        },
    },
}


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("format", list(RECORDS))
def test_a_prompt_is_put_as_the_training_data_put_it(
    format: str, template: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """Oracle: the tokens that are not learnt of a training example with this question, as loading makes it."""
    tokenizer.chat_template = TEMPLATE if template else None
    (tmp_path / "data.jsonl").write_text(json.dumps(RECORDS[format]) + "\n")
    data = DatasetConfig(train_path=str(tmp_path / "data.jsonl"), eval_fraction=0.0)
    loaded = load_datasets(data, tokenizer, max_length=400, seed=0, bundled=False, cache_dir=tmp_path / "cache")
    assert loaded.format == format
    example = loaded.train[0]
    prompt = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
    for content in (QUESTION, [USER]):
        assert Asked([Prompt(content, "here")], tokenizer, format, False).ids == [prompt]
    tokenizer.chat_template = None


def test_plain_text_goes_on_from_the_prompt(tokenizer: Any) -> None:
    asked = Asked([Prompt("the answer is", "here")], tokenizer, "text", False)
    assert asked.ids == [tokenizer("the answer is").input_ids]


def test_several_turns_are_a_chat(tokenizer: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "and 3 + 4?"}]
    tokenizer.chat_template = TEMPLATE
    (ids,) = Asked([Prompt(turns, "here")], tokenizer, "messages", False).ids
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="asked.jsonl, line 2: 'messages' of several turns"):
        Asked([Prompt(turns, "asked.jsonl, line 2")], tokenizer, "alpaca", False)


# ---- answers ----


def _long(tokenizer: Any, length: int) -> str:
    """A text of so many tokens."""
    text = "a" * length
    while len(tokenizer(text).input_ids) > length:
        text = text[1:]
    while len(tokenizer(text).input_ids) < length:
        text += " a"
    assert len(tokenizer(text).input_ids) == length
    return text


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora", "full"])
def test_answers_are_those_of_generate_one_at_a_time(
    method: str, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding, on a model in float64, whose best token padding cannot change. Fresh, they are the base's."""
    monkeypatch.setattr(sample_answers, "NEW_TOKENS", 16)
    base = make_model("llama", torch.float64, vocab_size=len(tokenizer))
    model = attached(base, method).train()
    prompts = ["a", "the answer is", "What is 2 + 3?", "true or false", *map(str, range(7))]
    context = base.config.max_position_embeddings
    prompts[1:1] = [_long(tokenizer, context - 3), _long(tokenizer, context - 1)]  # the others' answers are no shorter
    asked = Asked([Prompt(text, "here") for text in prompts], tokenizer, "text", False)
    before = torch.random.get_rng_state()
    answers = asked.answers(model, 0)
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    assert all(module.training for module in model.modules())
    for ids, (text, cut) in zip(asked.ids, answers, strict=True):
        room = min(sample_answers.NEW_TOKENS, context - len(ids))
        out = base.generate(torch.tensor([ids]), max_new_tokens=room, do_sample=False, pad_token_id=0, eos_token_id=2)
        new = out[0, len(ids) :].tolist()
        assert cut == (None if 2 in new else room)
        kept = new[: new.index(2)] if 2 in new else new
        expected = tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert text == expected


@pytest.mark.parametrize("method", ["s2ft", "lora"])
def test_the_models_own_generation_settings_do_not_count(method: str, make_model: Any, tokenizer: Any) -> None:
    """Nor are they changed: of peft's model neither its own nor those of the model inside."""
    model = attached(make_model("llama", torch.float64, vocab_size=len(tokenizer)), method)
    asked = Asked([Prompt("the answer is", "here"), Prompt("a", "here")], tokenizer, "text", False)
    expected = asked.answers(model, 0)
    own = language_model(model).generation_config
    own.update(
        no_repeat_ngram_size=1, num_return_sequences=2, return_dict_in_generate=True, suppress_tokens=[5, 6, 7],
        do_sample=True, temperature=0.3, min_new_tokens=9,
    )  # fmt: skip
    before = own.to_dict()
    assert asked.answers(model, 0) == expected
    assert language_model(model).generation_config is own and own.to_dict() == before


def test_an_answer_ends_where_a_question_of_its_own_begins(tokenizer: Any) -> None:
    asked = Asked([Prompt(QUESTION, "here")], tokenizer, "guanaco", False)

    class Model(torch.nn.Module):
        device, config = torch.device("cpu"), transformers.LlamaConfig(max_position_embeddings=512)

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            said = tokenizer(" it is 5### Human: and now?").input_ids
            return torch.cat([input_ids, torch.tensor([said])], 1)

    assert asked.answers(Model(), 0) == [("it is 5", None)]


def test_an_answer_ends_with_the_turn_of_the_template(tokenizer: Any) -> None:
    """Training ends an answer with the template's mark, and puts no EOS behind it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<|im_end|>")
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = Asked([Prompt(QUESTION, "here")], tokenizer, "messages", False)
    assert asked.ends == [tokenizer.eos_token_id, mark]

    class Model(torch.nn.Module):
        device, config = torch.device("cpu"), transformers.LlamaConfig(max_position_embeddings=512)

        def generate(self, input_ids: torch.Tensor, eos_token_id: list[int], **_: Any) -> torch.Tensor:
            said = [*tokenizer("it is 5").input_ids, mark, *tokenizer("and so on").input_ids]
            return torch.cat([input_ids, torch.tensor([said])], 1)

    assert asked.answers(Model(), 0) == [("it is 5", None)]
    assert Asked([Prompt(QUESTION, "here")], tokenizer, "messages", True).ends == [tokenizer.eos_token_id]


# ---- in a run ----


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> list[str]:
    data = write_data(tmp_path_factory.mktemp("data"))["json"]
    words = [*on(model_folder(), data), *METHODS["lora"], "method.dropout=0.2", "trainer.learning_rate=1e-2"]
    return ["train", *words, "trainer.save_steps=2", "trainer.logging_steps=1", "dataset.max_examples=16"]


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_run_is_the_same_and_a_resumed_one_asks_what_is_missing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit with dropout; of a run that is continued, lines after the checkpoint come again, the base's stay."""
    (tmp_path / "asked.txt").write_text("2+3=\n\n  4+5=\n")
    asking = ["trainer.sample_prompts=asked.txt", "trainer.sample_steps=1"]
    sparseft(tmp_path, *words, "trainer.max_steps=4", "output_dir=plain")
    done = sparseft(tmp_path, *words, *asking, "trainer.max_steps=4", "output_dir=run")
    run = tmp_path / "run"
    state = json.loads((run / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"] == [], "what is logged stands in metrics.jsonl: a checkpoint must not grow with it"
    found = samples(run)
    assert [(line["step"], line["model"], line["prompt"]) for line in found] == [
        (step, "adapter" if step else "base", prompt) for step in range(5) for prompt in ("2+3=", "4+5=")
    ]
    assert "step 0, base on '2+3='" in done.err and "step 4, adapter on '4+5='" in done.err

    content = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(content + '{"step": 7, "torn')
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    times = []
    plain = Asked.answers
    monkeypatch.setattr(Asked, "answers", lambda *args: times.append(1) or plain(*args))
    sparseft(tmp_path, *words, *asking, "trainer.max_steps=4", "output_dir=run", "trainer.resume=auto")
    assert (run / "samples.jsonl").read_text() == content and len(times) == 2
    sparseft(tmp_path, *words, *asking, "trainer.max_steps=4", "output_dir=run", "trainer.resume=auto")
    assert len(times) == 2  # nothing was left to train
    (run / "samples.jsonl").unlink()
    same_end(run, tmp_path / "plain")


def test_an_interrupt_saves_before_it_asks(words: list[str], tmp_path: Path) -> None:
    """A scheduler gives few seconds from its signal on; the step is asked for when the run goes on."""
    asking = [*words, "trainer.sample_prompts=[seven]", "trainer.sample_steps=1", "trainer.max_steps=4"]
    plain = Trainer.training_step

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        sparseft(tmp_path, *asking, "output_dir=run", code=130)
    assert [line["step"] for line in samples(tmp_path / "run")] == [0, 1]
    sparseft(tmp_path, *asking, "output_dir=run", "trainer.resume=auto")
    sparseft(tmp_path, *asking, "output_dir=whole")
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")


def test_other_prompts_of_a_resumed_run_have_the_bases_answers_first(words: list[str], tmp_path: Path) -> None:
    common = [*words, "output_dir=run", "trainer.eval_steps=1"]
    sparseft(tmp_path, *common, "trainer.max_steps=2", "trainer.sample_prompts=[seven]")
    base = samples(tmp_path / "run")[0]
    sparseft(tmp_path, *common, "trainer.max_steps=3", "trainer.sample_prompts=[seven,nine]", "trainer.resume=auto")
    found = samples(tmp_path / "run")
    assert [(line["step"], line["prompt"]) for line in found] == [
        *((0, "seven"), (0, "nine")), *((1, "seven"), (2, "seven")), *((3, "seven"), (3, "nine")),
    ]  # fmt: skip
    assert found[0] == base


@pytest.mark.parametrize("early", [False, True])
def test_the_last_answers_are_those_of_the_mean(
    early: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is what is left, also where the run ends before its last step."""
    done: list[Any] = []
    take, answers = Average.take, Asked.answers
    monkeypatch.setattr(Average, "take", lambda self: done.append("mean") or take(self))
    monkeypatch.setattr(Asked, "answers", lambda self, *args: [(f"{len(done)}", False) for _ in answers(self, *args)])
    more = ["trainer.patience=1", "trainer.eval_steps=1", "trainer.learning_rate=1e-30"] if early else []
    sparseft(
        tmp_path, *words, *more, "trainer.sample_prompts=[seven]", "trainer.sample_steps=1", "trainer.max_steps=3",
        "trainer.average=ema:0.5", "output_dir=run",
    )  # fmt: skip
    last = 2 if early else 3
    found = [(line["step"], line["answer"]) for line in samples(tmp_path / "run")]
    assert found == [*((step, "0") for step in range(last)), (last, "1")]


@pytest.mark.parametrize("method", ["sylva", "full"])
def test_with_recomputed_activations(method: str, words: list[str], tmp_path: Path) -> None:
    common = [word for word in words if word not in METHODS["lora"] and "dropout" not in word]
    common += [*METHODS[method], "hardware.gradient_checkpointing=true", "trainer.max_steps=2"]
    sparseft(tmp_path, *common, "output_dir=plain")
    sparseft(tmp_path, *common, "output_dir=run", "trainer.sample_prompts=[seven]", "trainer.sample_steps=1")
    assert [line["step"] for line in samples(tmp_path / "run")] == [0, 1, 2]
    (tmp_path / "run" / "samples.jsonl").unlink()
    same_end(tmp_path / "run", tmp_path / "plain")


def test_asking_takes_none_of_the_trainings_time(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Asked.answers

    def slow(*args: Any) -> Any:
        time.sleep(0.7)
        return plain(*args)

    monkeypatch.setattr(Asked, "answers", slow)
    asking = ["trainer.sample_prompts=[seven]", "trainer.sample_steps=1", "trainer.max_steps=3", "output_dir=run"]
    begun = time.monotonic()
    sparseft(tmp_path, *words, *asking)
    took = time.monotonic() - begun
    run = tmp_path / "run"
    assert took > 4 * 0.7 and summary(run)["train_seconds"] < took - 4 * 0.7
    assert all(line["step_seconds"] < summary(run)["train_seconds"] for line in metrics(run) if "loss" in line)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["trainer.sample_prompts=[]"], ["the list is empty"]),
        (["trainer.sample_prompts=prompts.tx"], ["there is no file 'prompts.tx'", "prompts.txt"]),
        (["trainer.sample_prompts=owner/name"], ["there is no file 'owner/name'"]),
        (["trainer.sample_prompts=empty.txt"], ["'empty.txt' holds no prompt"]),
        (["trainer.sample_prompts=empty.jsonl"], ["empty.jsonl"]),
        (["trainer.sample_prompts=odd.jsonl"], ["odd.jsonl, line 2", "'prompt'", "it has: question"]),
        (["trainer.sample_prompts=[a]", "trainer.sample_steps=0"], ["trainer.sample_steps=0", "at least 1"]),
        (["trainer.sample_steps=2"], ["trainer.sample_steps=2", "trainer.sample_prompts"]),
        (["trainer.sample_prompts=many.txt"], ["65 prompts", "at most 64"]),
        (["trainer.sample_prompts=long.txt"], ["long.txt, line 1", "leaves no room"]),
        (["trainer.sample_prompts=turns.jsonl"], ["turns.jsonl, line 1", "prompt_completion"]),
    ],
)
def test_what_cannot_be_asked_is_refused(given: list[str], parts: list[str], words: list[str], tmp_path: Path) -> None:
    texts = {
        "prompts.txt": "a\n",
        "empty.txt": "\n \n",
        "empty.jsonl": "",
        "odd.jsonl": '{"prompt": "a"}\n{"question": "b"}\n',
        "many.txt": "a\n" * 65,
        "long.txt": "is " * 2000,
        "turns.jsonl": json.dumps({"messages": [USER, {"role": "assistant", "content": "5"}, USER]}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    message = refused(tmp_path, *words, "trainer.max_steps=1", "output_dir=run", *given)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ("", "prompt_completion", "asked.jsonl, line 7: the prompt holds nothing"),
        (" ", "alpaca", "asked.jsonl, line 7: 'instruction' is empty"),
        ("half \ud800", "text", "asked.jsonl, line 7: the text holds half a surrogate pair"),
        (QUESTION, "text", "asked.jsonl, line 7: token '.*' has the id"),
    ],
)
def test_what_no_model_can_read_is_refused_where_it_stands(
    content: str, format: str, message: str, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Asked([Prompt(content, "asked.jsonl, line 7")], tokenizer, format, False).check(2, None)


def test_files_of_prompts(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "5"}
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in ({"prompt": "one"}, {"messages": [USER, answer]}))
    )
    first, second = read_prompts(str(tmp_path / "a.jsonl"))
    assert first.content == first.text == "one" and first.where.endswith("a.jsonl, line 1")
    assert second.content == [USER] and second.text == QUESTION  # the answer that is asked for is left out
    (tmp_path / "b.txt").write_bytes('\ufeffüber\r\n\r\n{"x": 1}\r\n'.encode())
    assert [prompt.content for prompt in read_prompts(str(tmp_path / "b.txt"))] == ["über", '{"x": 1}']
    assert read_prompts(None) == []


def test_what_stands_beside_the_messages_is_asked_too(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for tool in tools or [] %}<s>TOOL {{ tool.function.name }}{% endfor %}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "add"}}]
    records = [{"messages": [USER]}, {"system": "Be brief.", "tools": tools, "messages": [USER]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    first, second = read_prompts(str(tmp_path / "a.jsonl"))
    assert first.text == second.text and first.id != second.id
    plain, full = (tokenizer.decode(ids) for ids in Asked([first, second], tokenizer, "messages", False).ids)
    tokenizer.chat_template = None
    assert full == "<s>TOOL add<s>system: Be brief." + plain and plain == f"<s>user: {QUESTION}<s>assistant: "


def test_what_has_no_example_to_ask_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [USER, {"role": "assistant", "content": " "}, USER]
    with pytest.raises(UserError, match="^here: nothing can be asked .1 record left out: an assistant's 'content' is"):
        Asked([Prompt(turns, "here")], tokenizer, "messages", False)
    tokenizer.chat_template = None


def test_an_answer_ends_where_a_turn_of_the_datas_own_form_begins(tokenizer: Any) -> None:
    prompts = [Prompt("Why?", "a list")]
    stops = {form: Asked(prompts, tokenizer, form, False).stops for form in ("alpaca", "oasst_trees", "text")}
    assert stops == {"alpaca": STOPS["alpaca"], "oasst_trees": STOPS["guanaco"], "text": []}
    assert Asked(prompts, tokenizer, "messages", True).stops == ["\n\nUser:"]
