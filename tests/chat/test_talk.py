"""A talk: who answers what, what they are shown, and the commands; with the bundled model and runs on it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import sparseft
from sparseft.chat.form import find_form
from sparseft.chat.screen import Pipe
from sparseft.chat.talk import Leave, Talk
from sparseft.chat.voices import Voices
from sparseft.compose.run_config import compose, to_yaml
from sparseft.config import BUNDLED_ROOT
from sparseft.data.prompts import alpaca_conversation
from sparseft.errors import Interrupted, UserError
from sparseft.evaluation.target import find_target
from sparseft.layers import sparse_layers
from support.data import load

TINY = BUNDLED_ROOT / "tiny"
QUESTIONS = ("What is 12 + 30?", "And why?", "Name the colour of a raven.")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Heard(Pipe):
    """What a talk shows: answers by name, in order, and notes."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextlib.contextmanager
    def answer(self) -> Iterator[Any]:
        with self.answers([""]) as says:
            yield says[""]

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        pieces: dict[str, list[str]] = {name: [] for name in names}
        yield {name: pieces[name].append for name in names}
        self.said += [(name, "".join(found)) for name, found in pieces.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the bundled model that say other things than it does, `one`, `two` (s2ft), `lora` and `full`, and the
    bundled model with a chat template, `templated`."""
    folder = tmp_path_factory.mktemp("world")
    for seed, (name, config, format) in enumerate(
        [
            ("one", sparseft.S2FTConfig(sparsity=0.9, importance="random"), "alpaca"),
            ("two", sparseft.S2FTConfig(sparsity=0.9, importance="random", seed=1), "guanaco"),
            ("lora", sparseft.LoraConfig(rank=2), "alpaca"),
            ("full", sparseft.FullConfig(), "alpaca"),
        ]
    ):
        model = sparseft.attach(plain_model(TINY), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in sparseft.trainable_parameters(model).values():
                parameter += (0.03 if name == "full" else 0.3) * torch.randn(parameter.shape, generator=generator)
        for layer in sparse_layers(model).values():
            layer.write_back()
        sparseft.save_adapter(model, folder / name / "adapter")
        (folder / name / "config.yaml").write_text(to_yaml(compose("train", ["model.dtype=float32"])))
        (folder / name / "environment.json").write_text(json.dumps({"data": {"format": format}}))
        if name == "full":
            transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / name / "adapter")
    shutil.copytree(TINY, folder / "templated")
    (folder / "templated" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def talk_to(*words: str, run: Path | None = None, adapter: Path | None = None) -> tuple[Talk, Heard]:
    """A talk with short greedy answers in fp32; with neither run nor adapter to the base."""
    words = ("model.dtype=float32", "chat.max_new_tokens=12", *words)
    config = compose("chat", words)
    given = {"run": run and str(run), "adapter": adapter and str(adapter), "base": not (run or adapter)}
    target = find_target(config, overrides=words, **given)
    heard = Heard()
    return Talk(Voices(target, config, words, is_base=given["base"]), heard), heard


def answer_of(model: Any, tokenizer: Any, ids: list[int], stop: str | None = None) -> str:
    """What transformers makes of a prompt, greedily and without a cache from before."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text.partition(stop)[0].strip() if stop else text.strip()


def plain_model(path: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_three_turns_are_one_templated_conversation(world: Path) -> None:
    """Each answer is that of `generate` to the whole conversation, though most of it is not read again."""
    talk, heard = talk_to(f"model.path={world / 'templated'}")
    model = plain_model(world / "templated")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "templated")
    messages: list[dict[str, str]] = []
    read: list[int] = []
    inner = talk.voices.model(talk.asked[0])
    inner.get_input_embeddings().register_forward_hook(lambda _, given, out: read.append(given[0].shape[1]))
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = answer_of(model, tokenizer, ids)
        read.clear()
        talk.take(question)
        assert heard.said[-1] == ("", expected) and expected
        assert read[0] < len(ids) / 2 or len(messages) == 1
        messages.append({"role": "assistant", "content": expected})
    assert talk.conversation.messages("base") == messages
    ends = [answer["ended"] for turn in talk.turns for answer in turn["answers"].values()]
    assert len(heard.notes) == ends.count("length") and "cut after 12 tokens (chat.max_new_tokens)" in heard.notes


def test_both_see_their_own_answers(world: Path) -> None:
    """In the words of the training data; the base is the base bit for bit, in between and after."""
    talk, heard = talk_to(run=world / "one")
    assert [voice.name for voice in talk.asked] == ["one"] and talk.asked[0].form.name == "alpaca"
    base = plain_model(TINY)
    tokenizer = talk.voices.tokenizer
    trained = sparseft.load_adapter(plain_model(TINY), world / "one" / "adapter").eval()
    talk.take("/both")
    said: dict[str, list[tuple[str, str]]] = {"base": [], "one": []}
    for question in QUESTIONS[:2]:
        talk.take(question)
        for (name, found), model in zip(heard.said[-2:], (base, trained), strict=True):
            prompt = alpaca_conversation(said[name], question)
            expected = answer_of(model, tokenizer, tokenizer(prompt).input_ids, "### Instruction")
            assert found == expected and expected, (name, question)
            said[name].append((question, expected))
    assert [name for name, _ in heard.said] == ["base", "one"] * 2
    assert said["base"] != said["one"]
    assert list(talk.conversation.by_voice()) == ["base", "one"]
    talk.take("/base")
    talk.take(QUESTIONS[2])
    prompt = alpaca_conversation(said["base"], QUESTIONS[2])
    assert heard.said[-1] == ("", answer_of(base, tokenizer, tokenizer(prompt).input_ids, "### Instruction"))
    # What was not asked of the adapter it is shown as the base said it.
    assert talk.conversation.messages("one")[-1]["content"] == heard.said[-1][1]


def test_switching_between_adapters_and_the_base(world: Path) -> None:
    talk, heard = talk_to(run=world / "one")
    question = QUESTIONS[0]

    def alone(line: str) -> str:
        talk.take(line)
        talk.take("/reset")
        talk.take(question)
        return heard.said[-1][1]

    one = alone("/adapter one")
    base = alone("/base")
    two = alone(f"/adapter {world / 'two'}")
    assert talk.asked[0].form.name == "guanaco" and list(talk.voices.trained) == ["one", "two"]
    assert (alone("/adapter one"), alone("/base"), alone(f"/adapter {world / 'two'}")) == (one, base, two)
    assert list(talk.voices.trained) == ["one", "two"]  # not loaded twice
    assert len({one, base}) == 2
    again, there = talk_to(run=world / "two")
    again.take(question)
    assert there.said[-1][1] == two
    plain, there = talk_to()
    plain.take(question)
    assert there.said[-1][1] == base
    alone("/base")
    assert alone("/adapter") == two  # the one that was chosen last
    with pytest.raises(UserError, match="no adapter is called 'tow'.* Did you mean 'two'"):
        talk.take("/adapter tow")
    lora = alone(f"/adapter {world / 'lora'}")  # of another kind, so with a model of its own
    assert (alone("/adapter two"), alone("/adapter lora"), alone("/base")) == (two, lora, base)
    there, other = talk_to(run=world / "lora")
    there.take(question)
    assert other.said == [("", lora)] and lora not in (base, two)


def test_an_adapter_can_come_later(world: Path) -> None:
    talk, heard = talk_to()
    with pytest.raises(UserError, match="no adapter is loaded yet: /adapter FOLDER"):
        talk.take("/both")
    talk.take(f"/adapter {world / 'lora' / 'adapter'}")
    assert [voice.name for voice in talk.asked] == ["lora"] and talk.asked[0].form.name == "alpaca"
    talk.take(QUESTIONS[0])
    there, other = talk_to(adapter=world / "lora" / "adapter")
    there.take(QUESTIONS[0])
    assert heard.said == other.said


def test_a_model_that_was_trained_whole_and_its_base(world: Path) -> None:
    talk, heard = talk_to(run=world / "full")
    talk.take("/both")
    talk.take(QUESTIONS[0])
    assert [name for name, _ in heard.said] == ["base", "full"]
    tokenizer = talk.voices.tokenizer
    ids = tokenizer(alpaca_conversation([], QUESTIONS[0])).input_ids
    for (_, found), path in zip(heard.said, (TINY, world / "full" / "adapter"), strict=True):
        assert found == answer_of(plain_model(path), tokenizer, ids, "### Instruction")
    alone, _ = talk_to(adapter=world / "full" / "adapter")
    with pytest.raises(UserError, match="does not say what it was before training"):
        alone.take("/base")


def test_what_is_saved_can_be_learnt(world: Path, tmp_path: Path) -> None:
    talk, heard = talk_to(run=world / "one")
    with pytest.raises(UserError, match="nothing was said yet"):
        talk.take(f"/save {tmp_path / 'talk.jsonl'}")
    talk.take("/system Be brief.")
    talk.take(QUESTIONS[0])
    talk.take("/both")
    talk.take(QUESTIONS[1])
    path = tmp_path / "talk.jsonl"
    talk.take(f"/save {path}")
    assert heard.notes[-1] == f"saved to {path} (a line each: one, base)"
    loaded = load(str(path), talk.voices.tokenizer, max_length=500)
    assert loaded.format == "messages" and len(loaded.train) == 2 and not loaded.dropped
    texts = [talk.voices.tokenizer.decode(item["input_ids"], skip_special_tokens=True) for item in loaded.train]
    (_, first), (_, base), (_, one) = heard.said
    head = f"Be brief.\n\nUser: {QUESTIONS[0]}\n\nAssistant: {first}\n\nUser: {QUESTIONS[1]}\n\nAssistant: "
    assert texts == [head + one, head + base]
    # It may grow, but no other file is replaced.
    talk.take("/adapter")
    talk.take(QUESTIONS[2])
    talk.take(f"/save {path}")
    assert len(load(str(path), talk.voices.tokenizer).train) == 2
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        talk.take(f"/save {tmp_path / 'mine.jsonl'}")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        talk.take(f"/save {tmp_path / 'nowhere' / 'talk.jsonl'}")


def test_a_full_context_loses_its_oldest_turns_and_says_so_once(world: Path) -> None:
    talk, heard = talk_to("chat.prompt=plain")
    tokenizer = talk.voices.tokenizer
    talk.take("/system Answer.")
    lengths = []
    for number in range(8):
        talk.take(f"{number}: " + "the raven is black and " * 8)
        lengths.append(len(talk.asked[0].memory.ids))
        text = tokenizer.decode(talk.asked[0].memory.ids, skip_special_tokens=True)
        assert text.startswith("Answer.") and f"User: {number}" in text
    assert "User: 0" not in text and "User: 6" in text  # the oldest first, and not more than it takes
    assert 512 - 130 < lengths[-1] < 512
    assert [note for note in heard.notes if "no longer sees" in note] == [
        "the context of 512 tokens is full: from now on the model no longer sees the oldest questions and answers"
    ]
    assert len(talk.conversation.turns) == 8  # what is saved is whole
    with pytest.raises(UserError, match=r"the question takes \d+ tokens, the model's context has 512"):
        talk.take("raven " * 600)
    assert len(talk.conversation.turns) == 8
    talk.take("/reset")
    assert not talk.conversation.turns and talk.conversation.system == "Answer."
    talk.take("the raven is black and " * 82)  # leaves room for six tokens
    answer = talk.turns[-1]["answers"]["base"]
    assert answer["tokens"] < 12 and (answer["ended"] == "itself") != heard.notes[-1].endswith("(the context is full)")


def test_a_question_that_stands_alone_leaves_out_nothing(world: Path) -> None:
    """It sees no turns before it: those that a later one sees are not the fewer for its length."""
    talk, heard = talk_to(run=world / "one")
    talk.take(QUESTIONS[0])
    trained = talk.asked[0]
    form, trained.form = trained.form, find_form("raw", talk.voices.tokenizer, None)
    words = next(n for n in range(600) if len(talk.voices.tokenizer("raven " * n).input_ids) > 504)
    talk.take("raven " * words)
    assert not [note for note in heard.notes if "no longer sees" in note]
    trained.form = form
    talk.conversation.turns.pop()
    talk.take(QUESTIONS[1])
    assert QUESTIONS[0] in talk.voices.tokenizer.decode(trained.memory.ids)


def test_what_cannot_share_a_talk_is_refused(world: Path, tmp_path: Path) -> None:
    """PEFT's own folders know no fingerprint of their base; a tokenizer of its own would be passed over."""
    talk, _ = talk_to(run=world / "one")
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    peft.get_peft_model(plain_model(other), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=f"made for the base {other}, and this talk's is .*model.path=FOLDER"):
        talk.take(f"/adapter {tmp_path / 'b'}")
    shutil.copytree(world / "two" / "adapter", tmp_path / "own")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(tmp_path / "own")
    talk.take(f"/adapter {tmp_path / 'own'}")
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(world / "two" / "adapter", tmp_path / "templated")
    tokenizer.save_pretrained(tmp_path / "templated")
    with pytest.raises(UserError, match="another tokenizer .*: sparseft chat --adapter"):
        talk.take(f"/adapter {tmp_path / 'templated'}")
    assert list(talk.voices.trained) == ["one", "own"]


def test_whose_tokenizer_a_talk_has(world: Path, tmp_path: Path) -> None:
    """Of a whole model that does not say its base it is the model's own: an adapter's is compared with that one."""
    whole = tmp_path / "whole"
    shutil.copytree(world / "full" / "adapter", whole)
    (whole / "chat_template.jinja").write_text(TEMPLATE)
    talk, _ = talk_to(adapter=whole)
    with pytest.raises(UserError, match="another tokenizer"):
        talk.take(f"/adapter {world / 'lora' / 'adapter'}")
    with pytest.raises(UserError, match="does not say what it was before training"):
        talk.take("/base")  # what was refused is no one's base
    shutil.copytree(world / "lora" / "adapter", tmp_path / "gone")
    path = tmp_path / "gone" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["sparseft"]["base_model"] = content["base_model_name_or_path"] = "someone/elsewhere"
    path.write_text(json.dumps(content))
    alone, heard = talk_to(adapter=world / "full" / "adapter")
    with pytest.raises(UserError, match="someone/elsewhere"):
        alone.take(f"/adapter {tmp_path / 'gone'}")
    alone.take(f"/adapter {world / 'one'}")  # as what was not found is no one's base either
    alone.take(QUESTIONS[0])
    talk, other = talk_to(run=world / "one")
    talk.take(QUESTIONS[0])
    assert heard.said == other.said
    with pytest.raises(UserError, match=f"another tokenizer .*: sparseft chat --adapter {whole} talks to it"):
        talk.take(f"/adapter {whole}")


def test_an_adapter_on_the_same_weights_needs_no_second_copy_of_them(world: Path, tmp_path: Path) -> None:
    """Its fingerprint says that they are the same, though its folder calls them by a hub id, which is not cached."""
    shutil.copytree(world / "two" / "adapter", tmp_path / "hub")
    path = tmp_path / "hub" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "someone/elsewhere"}))
    talk, heard = talk_to(run=world / "one")
    talk.take(f"/adapter {tmp_path / 'hub'}")
    talk.take(QUESTIONS[0])
    assert list(talk.voices.trained) == ["one", "hub"] and heard.said


def test_commands(world: Path) -> None:
    talk, heard = talk_to()
    for line in ("", "   "):
        talk.take(line)
    with pytest.raises(UserError, match=r"no command /hepl. Did you mean '/help'\?"):
        talk.take("/hepl")
    with pytest.raises(UserError, match="/reset takes nothing: 'all' comes after it"):
        talk.take("/reset all")
    talk.take("/help")
    assert [note.split()[0] for note in heard.notes] == list(talk.actions)
    talk.take("/system Be kind.")
    assert talk.conversation.system == "Be kind."
    talk.take("/system")
    assert talk.conversation.system == "" and heard.notes[-1] == "no system message"
    talk.take(" /etc/passwd is a file.")  # a question, as its first letter is no slash
    assert talk.conversation.turns[0].question == "/etc/passwd is a file."
    with pytest.raises(Leave):
        talk.take("/quit")
    raw, _ = talk_to("chat.prompt=raw")
    with pytest.raises(UserError, match="no place for a system message"):
        raw.take("/system Be kind.")
    assert raw.conversation.system == ""


def test_sampling_follows_the_seed(world: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        talk, heard = talk_to("chat.temperature=3.0")
        torch.manual_seed(seed)
        talk.take(QUESTIONS[0])
        found.append(heard.said)
    assert found[0] == found[1] != found[2]


class Typed(Heard):
    """A terminal on which these things happen; a type is what is raised."""

    interactive = True

    def __init__(self, *happens: Any) -> None:
        super().__init__()
        self.happens = list(happens)

    def ask(self, name: str) -> str:
        found = self.happens.pop(0)
        if isinstance(found, str):
            return found
        raise found

    def error(self, text: str) -> None:
        self.notes.append(f"error: {text}")


def test_a_terminal_goes_on_after_what_was_wrong_and_is_left_in_time(world: Path) -> None:
    voices = talk_to()[0].voices
    again = "Ctrl-C again or Ctrl-D leaves"
    screen = Typed("/nonsense", KeyboardInterrupt, "", KeyboardInterrupt, "/reset", KeyboardInterrupt, EOFError, "no")
    Talk(voices, screen).run()
    assert screen.happens == ["no"] and screen.notes.count(again) == 3
    assert [note for note in screen.notes if note.startswith("error: no command /nonsense")]
    screen = Typed(KeyboardInterrupt, KeyboardInterrupt, "no")
    Talk(voices, screen).run()
    assert screen.happens == ["no"]
    for end, pipe in ((Interrupted("SIGTERM"), False), (KeyboardInterrupt(), True), (UserError("x"), True)):
        screen = Typed(end, "no")
        screen.interactive = not pipe
        with pytest.raises(type(end)):
            Talk(voices, screen).run()


def test_what_was_said_before_an_interrupt_is_kept(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal ends the answer after the present token, a second one at once; SIGTERM ends the talk too."""
    voices = talk_to("chat.max_new_tokens=60", "chat.prompt=raw")[0].voices
    monkeypatch.setattr(sparseft.signals, "TOGETHER", 0.0)  # the second one is no echo of the first

    def after(pieces: int, *signals: int) -> Talk:
        class Screen(Typed):
            @contextlib.contextmanager
            def answer(self) -> Iterator[Any]:
                def say(text: str) -> None:
                    self.said.append(("", text))
                    if len(self.said) == pieces:
                        for number in signals:
                            signal.raise_signal(number)

                yield say

        screen = Screen()
        talk = Talk(voices, screen)
        try:
            talk.take("The raven")
        except Interrupted:
            screen.notes.append("SIGTERM")
        return talk

    whole = after(0).turns[0]["answers"]["base"]
    assert whole["tokens"] > 12
    for signals in ((signal.SIGINT,), (signal.SIGINT, signal.SIGINT)):
        talk = after(3, *signals)
        answer = talk.turns[0]["answers"]["base"]
        assert answer["ended"] == "interrupted" and 2 < answer["tokens"] < 12
        assert whole["text"].startswith(answer["text"]) and talk.screen.notes == ["stopped"]
        assert talk.conversation.turns[0].answers == {"base": answer["text"]} and answer["text"]
        assert after(0).turns[0]["answers"]["base"] == whole  # nothing wrong is left behind
    assert after(3, signal.SIGTERM).screen.notes == ["SIGTERM"]
