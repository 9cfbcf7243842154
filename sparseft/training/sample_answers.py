"""`trainer.sample_prompts`: what base and adapter answer on the way, in `samples.jsonl`, the log and the trackers.

A prompt is put as the training data put theirs: it is a training example without its answer. Answers are greedy; that
they are asked changes no random number and no mode of the training, and no second of its time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from sparseft import console
from sparseft.data.chat import BESIDE, Chats
from sparseft.data.encoding import Encoder
from sparseft.data.files import locate_file, open_file
from sparseft.data.formats import Converter, Example, Plain
from sparseft.data.loading import no_row
from sparseft.data.prompts import ASSISTANT, STOPS, human_turn
from sparseft.data.records import Records
from sparseft.data.templates import end_of_turn
from sparseft.distributed import ranks
from sparseft.errors import UserError, shown
from sparseft.files.atomic import dumps, write_text
from sparseft.files.untrusted import read_bytes, why
from sparseft.models.decoder import context_length, keeps_cache, plain_generation, runnable
from sparseft.replaced import replaced
from sparseft.rules import show
from sparseft.runs.folder import SAMPLES
from sparseft.runs.metrics import append_metrics, read_metrics, step_of
from sparseft.training.trainer import Trainer

KEY = "trainer.sample_prompts"
MAX_PROMPTS = 64
NEW_TOKENS = 128  # of an answer: enough to see what has been learnt
BATCH = 8  # prompts answered together
FEWER = f"fewer prompts in {KEY}, of which {BATCH} are answered together, or shorter ones, take less at once"
LOGGED = 3  # prompts whose answers are in the log
RECORDS = (".json", ".jsonl", ".ndjson")

Messages = list[dict[str, Any]]


@dataclass
class Prompt:
    """What is asked: a text, or the messages of a chat up to an answer; `where` it stands, for messages, and what its
    record has `beside` it, for the template."""

    content: str | Messages
    where: str
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is asked, in short: of a chat what is asked last."""
        return self.content if isinstance(self.content, str) else str(self.content[-1].get("content"))

    @property
    def id(self) -> str:
        """Tells it from others that ask the same last."""
        return hashlib.sha256(dumps([self.content, self.beside]).encode()).hexdigest()[:12]


def read_prompts(setting: list[str] | str | None) -> list[Prompt]:
    """The prompts that `trainer.sample_prompts` lists, or names the file of: lines of text, or JSON records with
    `prompt` or `messages` (whose last answer is left out). UserError for what holds none."""
    if setting is None:
        return []
    if isinstance(setting, list):
        prompts = [Prompt(text, f"{KEY}[{number}]") for number, text in enumerate(setting)]
    else:
        file = locate_file(setting, key=KEY)
        if file is None:  # a hub id, by its looks
            raise UserError(f"{KEY}: there is no file '{setting}'.")
        prompts = list(_records(file, setting) if file.suffix.lower() in RECORDS else _lines(file, setting))
    if not prompts:
        where = f"'{setting}' holds no prompt" if isinstance(setting, str) else "the list is empty"
        raise UserError(f"{KEY}={show(setting)}: {where}; give one at least, or null to ask nothing.")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{KEY}: {len(prompts)} prompts, but at most {MAX_PROMPTS} are answered on the way; give fewer."
        )
    return prompts


def _lines(file: Path, name: str) -> Iterator[Prompt]:
    try:
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}: '{name}' cannot be read ({why(error)}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Prompt(line.strip(), f"{name}, line {number}")


def _records(file: Path, name: str) -> Iterator[Prompt]:
    for records in open_file(file, name).chunks():
        for index, item in enumerate(records.items):
            where = records.where(index)
            prompt, messages = item.get("prompt"), item.get("messages")
            beside = {key: item[key] for key in BESIDE if key in item}
            if isinstance(prompt, str) and prompt.strip():
                yield Prompt(prompt, where, beside)
            elif isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
                if messages and messages[-1].get("role") == "assistant":
                    messages = messages[:-1]
                if not messages:
                    raise UserError(f"{where}: 'messages' ask nothing.")
                yield Prompt(messages, where, beside)
            else:
                keys = shown(", ".join(sorted(map(str, item))), 300) or "nothing"
                raise UserError(f"{where}: expected 'prompt' (a text) or 'messages' (a list), it has: {keys}.")


class Asked:
    """Prompts in the form of the training data, as token ids."""

    def __init__(
        self, prompts: list[Prompt], tokenizer: Any, format: str, plain_chat: bool, day: str | None = None
    ) -> None:
        self.prompts, self.tokenizer = prompts, tokenizer
        encoder = Encoder(tokenizer)
        chats = Chats(encoder, plain_chat, day) if format == "messages" else None
        if chats is not None:
            form = "plain" if chats.plainly else "chat"
        else:
            form = "guanaco" if format == "oasst_trees" else format
        self.stops = STOPS.get(form, [])  # prompts and plain texts have none
        self.ends = sorted(encoder.ends | (end_of_turn(tokenizer) if form == "chat" else set()))
        examples = [_example(prompt, format, chats) for prompt in prompts]
        self.ids = [[token for ids, _ in segments for token in ids] for segments in encoder.encode(examples)]

    def check(self, rows: int, context: int | None) -> None:
        """Refuses a prompt that the model, of so many rows of embeddings, cannot read, or that leaves it, of so many
        tokens of context, no room to answer."""
        for prompt, ids in zip(self.prompts, self.ids, strict=True):
            if not ids:
                raise UserError(f"{prompt.where}: the prompt holds nothing that the tokenizer knows.")
            if max(ids) >= rows:
                raise UserError(f"{prompt.where}: {no_row(max(ids), self.tokenizer, rows)}")
            if context and len(ids) >= context:
                raise UserError(
                    f"{prompt.where}: the prompt has {len(ids)} tokens, and the model's context of {context} leaves no "
                    "room for an answer; give a shorter one."
                )

    def answers(self, model: Any, pad: int) -> list[tuple[str, int | None]]:
        """What the model answers, and after how many tokens it was cut (`NEW_TOKENS`, or where the context ends; None:
        it ended), for each prompt. Greedy; leaves modes and random numbers as they were."""
        context = context_length(model.config)
        # One whose answer the context may end goes alone: the others' answers must not end there.
        alone = [place for place, ids in enumerate(self.ids) if context and len(ids) + NEW_TOKENS > context]
        others = [place for place in range(len(self.ids)) if place not in alone]
        batches = [others[start : start + BATCH] for start in range(0, len(others), BATCH)]
        found: dict[int, tuple[str, int | None]] = {}
        with _undisturbed(model):
            for places in [*batches, *([place] for place in alone)]:
                answers = self._batch(model, [self.ids[place] for place in places], pad, context)
                found |= zip(places, answers, strict=True)
        return [found[place] for place in range(len(self.ids))]

    def _batch(self, model: Any, rows: list[list[int]], pad: int, context: int | None) -> list[tuple[str, int | None]]:
        longest = max(map(len, rows))
        device = model.device
        output = model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device),
            max_new_tokens=min(NEW_TOKENS, context - longest) if context else NEW_TOKENS,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            use_cache=keeps_cache(model.config),
        )
        return [self._text(ids) for ids in output[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> tuple[str, int | None]:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        stops = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(stops, default=None)].strip(), len(ids) if end is None and not stops else None


@dataclass
class _Alone(Records):
    """One record, which stands where its prompt does."""

    at: str = ""

    def where(self, index: int) -> str:
        return self.at


def _example(prompt: Prompt, format: str, chats: Chats | None) -> Example:
    """A training example of the prompt, but for its answer."""
    content = prompt.content
    if isinstance(content, list) and chats is None:
        if len(content) > 1 or content[0].get("role") != "user" or not isinstance(content[0].get("content"), str):
            raise UserError(
                f"{prompt.where}: 'messages' of several turns or roles need training data of chats, and these have the "
                f"format {format}; give 'prompt'."
            )
        content = content[0]["content"]
    stand_in = "answer"
    converter: Converter
    if chats is not None:
        asked = content if isinstance(content, list) else [{"role": "user", "content": content}]
        converter, item = chats, {"messages": [*asked, {"role": "assistant", "content": stand_in}]}
    else:
        format = "guanaco" if format == "oasst_trees" else format
        converter, item = Plain(format), {
            "alpaca": {"instruction": content, "output": stand_in},
            "guanaco": {"text": f"{human_turn(str(content))}{ASSISTANT} {stand_in}"},
            "prompt_completion": {"prompt": content, "completion": stand_in},
            "text": {"text": content},
        }[format]  # fmt: skip
    found = converter.convert(_Alone([prompt.beside | item], "", "", [1], at=prompt.where))
    if not found:
        why = "; ".join(converter.warnings()) or converter.note(prompt.where)
        raise UserError(f"{prompt.where}: nothing can be asked ({why}).")
    example = found[-1]
    if format != "text":
        example.segments = example.segments[:-1]
    return example


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Inside, the model answers: greedily, whatever its own generation settings say, and drops nothing out. They,
    modes and random numbers are as before afterwards."""
    modes = [(module, "training", module.training) for module in model.modules()]
    cuda = [model.device] if model.device.type == "cuda" else []
    with replaced(*modes), torch.no_grad(), torch.random.fork_rng(devices=cuda), plain_generation(model):
        model.eval()
        with runnable(model):
            torch.manual_seed(0)
            yield


class SampleAnswers(transformers.TrainerCallback):
    """Asks on the way: `every` so many optimizer steps, or (None) at each evaluation.

    show(rows, step) gets what `samples.jsonl` does.
    """

    def __init__(
        self, asked: Asked, trainer: Trainer, model: Any, pad: int, every: int | None,
        show: Callable[[list[dict[str, Any]], int], None],
    ) -> None:  # fmt: skip
        self.asked, self.trainer, self.model, self.pad, self.every, self.show = asked, trainer, model, pad, every, show
        self.path = trainer.run_state.folder / SAMPLES
        self.steps = ranks.broadcast_object({step_of(line) for line in self._recorded()} if ranks.is_main() else None)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step:  # of a run that is continued, whose interrupt may have come in a step that asks
            self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_training_stop:  # an interrupted step is saved first, and asked for when the run goes on
            return
        # Those of the last step are asked for at the end: what is left may be a mean.
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.adapter(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if not self.every and state.global_step:
            self.adapter(state.global_step)

    def base(self) -> None:
        """The base's answers, where the run has not got those to these prompts: of the model before it is trained."""
        known = [line for line in self._recorded() if line.get("model") == "base"] if ranks.is_main() else []
        asked = [prompt.id for prompt in self.asked.prompts]
        if not ranks.broadcast_object([line.get("prompt_id") for line in known] == asked):
            self._take(0, "base")

    def adapter(self, step: int, anew: bool = False) -> None:
        """The adapter's answers, where they have not been asked for at this step, or are to be asked for `anew`."""
        if anew or step not in self.steps:
            self._take(step, "adapter")

    def _recorded(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def _take(self, step: int, who: str) -> None:
        # In shards all processes answer the same prompts in step; otherwise the first one does, and the others wait.
        with self.trainer.run_state.clock.paused(), self.trainer.advising_memory(FEWER):
            answers = []
            if ranks.is_main() or self.trainer.in_shards:
                with self.trainer.compute_loss_context_manager():
                    answers = self.asked.answers(self.model, self.pad)
            ranks.barrier()
        again = who == "base" or step in self.steps
        self.steps.add(step)
        if ranks.is_main():
            self._write(step, who, answers, again)

    def _write(self, step: int, who: str, answers: list[tuple[str, int | None]], again: bool) -> None:
        rows = [
            {"step": step, "model": who, "prompt": prompt.text, "answer": text, "prompt_id": prompt.id}
            | ({"cut": cut} if cut else {})
            for prompt, (text, cut) in zip(self.asked.prompts, answers, strict=True)
        ]
        if again:
            lines = [line for line in self._recorded() if line.get("model") != who or line.get("step") != step]
            lines = [*rows, *lines] if who == "base" else [*lines, *rows]
            write_text(self.path, "".join(dumps(line) + "\n" for line in lines))
        else:  # the file grows with the run: it is not written anew each time
            append_metrics(self.path, *rows)
        for row in rows[:LOGGED]:
            cut = f" … (cut after {row['cut']} tokens)" if "cut" in row else ""
            console.log(f"step {step}, {who} on {_short(row['prompt'], 80)!r}: {_short(row['answer'], 200)!r}{cut}")
        if len(rows) > LOGGED:
            console.log(f"step {step}, {who}: {len(rows) - LOGGED} more in {self.path}")
        self.show([{name: row[name] for name in ("step", "model", "prompt", "answer")} for row in rows], step)


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
