"""What was said: questions, with the answer of each who was asked."""

from __future__ import annotations

from dataclasses import dataclass, field

Message = dict[str, str]  # role and content, as chat templates and training data have them


@dataclass
class Turn:
    """A question and the answers to it, by who gave them; at least one, none of them empty."""

    question: str
    answers: dict[str, str]


@dataclass
class Conversation:
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, voice: str, question: str | None = None, left_out: int = 0) -> list[Message]:
        """What `voice` is shown: its own answers, and where it was not asked what another one said.

        question: what is asked now; left_out: the oldest turns that are not shown.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[left_out:]:
            answer = turn.answers.get(voice) or next(iter(turn.answers.values()))
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def by_voice(self) -> dict[str, list[Message]]:
        """The whole conversation as each who answered knows it; once, where two know the same."""
        found: dict[str, list[Message]] = {}
        for voice in dict.fromkeys(name for turn in self.turns for name in turn.answers):
            messages = self.messages(voice)
            if messages not in found.values():
                found[voice] = messages
        return found
