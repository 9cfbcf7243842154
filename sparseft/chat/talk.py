"""The talk: questions to who answers at present, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft import signals
from sparseft.chat.answer import Telling, tell
from sparseft.chat.conversation import Conversation, Turn
from sparseft.chat.form import prompt_ids
from sparseft.chat.screen import Pipe, Say, Terminal
from sparseft.chat.voices import Voice, Voices
from sparseft.data.loading import no_row
from sparseft.errors import Interrupted, UserError, nearest
from sparseft.files.atomic import dumps, write_text
from sparseft.models.decoder import context_length
from sparseft.models.loading import vocabulary_rows
from sparseft.runs.folder import timestamp

HELP = {
    "/base": "talk to the base model from now on",
    "/adapter [NAME|FOLDER]": "talk to what was trained, by its name, or to that of another folder",
    "/both": "ask both, the base model and what was trained",
    "/system [TEXT]": "instructions ahead of the conversation; without a text: none",
    "/reset": "forget what was said; the system message stays",
    "/save [FILE]": "the conversation as JSON lines that `sparseft train` reads",
    "/help": "this list",
    "/quit": "leave; Ctrl-D does too",
}


class Leave(Exception):
    """The talk is over."""


class Talk:
    """One conversation with `voices`, through a terminal or a pipe (`screen`)."""

    def __init__(self, voices: Voices, screen: Pipe | Terminal) -> None:
        self.voices, self.screen = voices, screen
        self.asked: list[Voice] = [voices.first]
        self.conversation = Conversation()
        self.turns: list[dict[str, Any]] = []  # of the whole talk, for a result
        self.saved: list[Path] = []
        self._left_out = 0  # turns that the context had no room for
        self._form = ("", "")  # that was said last
        self.actions: dict[str, Callable[[str], None]] = {
            command: getattr(self, f"_{command[1:]}") for command in (shown.split()[0] for shown in HELP)
        }

    def run(self) -> None:
        """Reads, answers and obeys until the input ends.

        Through a pipe what is wrong is a `UserError` at once; on a terminal it is said, and the talk goes on.
        """
        self._introduce()
        if self.screen.interactive:
            self.screen.note("/help lists what you can do besides asking; Ctrl-C stops an answer, Ctrl-D leaves")
        leaving = False
        while True:
            try:
                if leaving:
                    self.screen.note("Ctrl-C again or Ctrl-D leaves")
                line = self.screen.ask("+".join(voice.name for voice in self.asked))
                leaving = False
                self.take(line)
            except (EOFError, Leave):
                return
            except KeyboardInterrupt as signal:
                if isinstance(signal, Interrupted) or not self.screen.interactive:
                    raise
                if leaving:
                    return
                leaving = True
            except UserError as error:
                if not self.screen.interactive:
                    raise
                self.screen.error(str(error))

    def take(self, line: str) -> None:
        """Obeys a line that begins with a slash, and asks any other; an empty one is nothing."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.ask(line.strip())
            return
        command, _, rest = line.strip().partition(" ")
        if command not in self.actions:
            raise UserError(f"no command {command}.{nearest(command, self.actions)}")
        if rest.strip() and command not in ("/adapter", "/system", "/save"):
            raise UserError(f"{command} takes nothing: '{rest.strip()}' comes after it.")
        self.actions[command](rest.strip())

    def ask(self, question: str) -> None:
        """Has `question` answered by all who are asked, and keeps what was said."""
        names = [voice.name for voice in self.asked]
        prompts = {voice.name: self._prompt(voice, question) for voice in self.asked}
        told: dict[str, dict[str, Any]] = {}
        several = len(names) > 1
        with self.screen.answers(names) if several else self.screen.answer() as says:
            for voice in self.asked:
                say = says[voice.name] if several else says
                told[voice.name] = self._tell(voice, *prompts[voice.name], say)
                if told[voice.name]["ended"] == "interrupted":
                    break
        for name, answer in told.items():
            self._tell_of(name if several else "", answer)
        answers = {name: answer["text"] for name, answer in told.items() if answer["text"]}
        if answers:
            self.conversation.turns.append(Turn(question, answers))
        self.turns.append({"question": question, "answers": told})

    def _prompt(self, voice: Voice, question: str) -> tuple[list[int], int]:
        """The ids of the prompt, and how many tokens the answer may have; without the oldest turns where the context
        has no room for all."""
        model = self.voices.model(voice)
        rows, context = vocabulary_rows(model)[0], context_length(model.config)
        longest = model.generation_config.max_new_tokens
        room = longest if context is None else min(longest, context // 4)
        for left_out in range(self._left_out, len(self.conversation.turns) + 1):
            ids = prompt_ids(
                voice.form, self.conversation.messages(voice.name, question, left_out), self.voices.encoder
            )
            if voice.form.alone or context is None or len(ids) + room <= context:
                break
        if not ids:
            raise UserError("the question holds nothing that the tokenizer knows.")
        if max(ids) >= rows:
            raise UserError(f"the question cannot be read: {no_row(max(ids), self.voices.tokenizer, rows)}")
        if context is not None and len(ids) >= context:
            raise UserError(f"the question takes {len(ids)} tokens, the model's context has {context}: shorten it.")
        if left_out and not self._left_out:
            self.screen.note(
                f"the context of {context} tokens is full: from now on the model no longer sees the oldest questions "
                "and answers"
            )
        self._left_out = left_out
        return ids, longest if context is None else min(longest, context - len(ids))

    def _tell(self, voice: Voice, prompt: list[int], longest: int, say: Say) -> dict[str, Any]:
        """An answer: its `text`, how many `tokens`, and how it `ended`: itself, `length` or `interrupted`."""
        telling = Telling(self.voices.tokenizer, voice.form.stops, say)
        heard: list[str] = []
        model = self.voices.model(voice)
        # The first Ctrl-C ends the answer after the present token, a second one at once.
        with signals.noted(heard.append) if self.screen.interactive else contextlib.nullcontext():
            try:
                tell(model, prompt, telling, voice.memory, longest, lambda: bool(heard))
            except KeyboardInterrupt:
                voice.memory.forget()
                telling.end()
                if not heard:
                    raise
        if heard and heard[0] != "SIGINT":
            raise Interrupted(heard[0])
        ends = model.generation_config.eos_token_id or []
        full = not telling.stopped and len(telling.ids) >= longest and telling.ids[-1] not in ends
        ended = "interrupted" if heard else "length" if full else "itself"
        return {"text": telling.text, "tokens": len(telling.ids), "ended": ended}

    def _tell_of(self, name: str, answer: dict[str, Any]) -> None:
        """What is worth knowing of an answer that is no plain one."""
        before = f"{name}: " if name else ""
        if answer["ended"] == "length":
            wanted = self.voices.model(self.asked[-1]).generation_config.max_new_tokens
            why = "chat.max_new_tokens" if answer["tokens"] >= wanted else "the context is full"
            self.screen.note(f"{before}cut after {answer['tokens']} tokens ({why})")
        elif answer["ended"] == "interrupted":
            self.screen.note(f"{before}stopped")
        elif not answer["text"]:
            self.screen.note(f"{before}no answer: the model ended at once")

    def _introduce(self) -> None:
        """Says whom one talks to, and how questions are put where that is new."""
        whom = " and ".join(voice.what for voice in self.asked)
        form = self.asked[-1].form
        how = f"; prompts: {form.name}, {form.why}" if (form.name, form.why) != self._form else ""
        self._form = (form.name, form.why)
        self.screen.note(f"talking to {whom}{how}")

    def _base(self, _: str) -> None:
        self.asked = [self.voices.base()]
        self._introduce()

    def _adapter(self, name: str) -> None:
        self.asked = [self.voices.choose(name or None)]
        self._introduce()

    def _both(self, _: str) -> None:
        trained = self.voices.choose()
        self.asked = [self.voices.base(), trained]
        self._introduce()

    def _system(self, text: str) -> None:
        before, self.conversation.system = self.conversation.system, text
        try:
            self.asked[-1].form.write(self.conversation.messages(self.asked[-1].name, "a"))
        except UserError:
            self.conversation.system = before
            raise
        self.screen.note(f"system message: {text}" if text else "no system message")

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self._left_out = 0
        self.screen.note("what was said is forgotten")

    def _save(self, name: str) -> None:
        conversations = self.conversation.by_voice()
        if not conversations:
            raise UserError("nothing was said yet that could be saved.")
        path = Path(name or f"chat-{timestamp()}.jsonl").expanduser()
        if path.exists() and path.resolve() not in self.saved:  # what was saved here before is the same talk
            raise UserError(f"{path} is there already: give another name.")
        try:
            write_text(path, "".join(dumps({"messages": each}) + "\n" for each in conversations.values()))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        self.saved.append(path.resolve())
        whose = f" (a line each: {', '.join(conversations)})" if len(conversations) > 1 else ""
        self.screen.note(f"saved to {path}{whose}")

    def _help(self, _: str) -> None:
        self.screen.listing(HELP)
        if self.voices.trained:
            self.screen.note(f"trained: {', '.join(self.voices.trained)}")

    def _quit(self, _: str) -> None:
        raise Leave
