"""How far an evaluation is, as the user sees it."""

from __future__ import annotations

import contextlib

from sparseft import console

# lm-eval's name of what is asked, in its bars, and what one of it is: a choice's likelihood, or a text.
UNITS = {"loglikelihood": "choice", "generate_until": "text"}


class Answers:
    """Shows how many answers a model has given, by lm-eval's own counts: pass it as `progress` of `evaluate`.

    who: whose answers they are, "base" say.
    """

    def __init__(self, who: str = "model") -> None:
        self._shown = contextlib.ExitStack()
        self._display: console.Progress | None = None
        self._what = ""
        self.who = who

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def prepare(self, who: str) -> None:
        """The questions are made ready, which takes a while where they are many; `who` will answer."""
        self._close()
        self.who = who
        self._shown.enter_context(console.working("preparing the questions"))

    def __call__(self, what: str, done: int, total: int | None) -> None:
        unit = next((unit for name, unit in UNITS.items() if name in what), None)
        if unit is None:  # tokenizing and the like
            return
        if self._display is None or what != self._what or done < self._display.completed:
            self._close()
            self._what = what
            self._display = self._shown.enter_context(console.Progress(total, f"{self.who} answers", unit=unit))
        self._display.update(done)

    def _close(self) -> None:
        self._shown.close()
        self._display = None
