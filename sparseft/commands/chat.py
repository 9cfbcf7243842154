"""`sparseft chat`: talking to a run, an adapter or the base model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from sparseft import console
from sparseft.chat.screen import Pipe, Silent, Terminal
from sparseft.chat.talk import Talk
from sparseft.chat.voices import Voices
from sparseft.config import RunConfig
from sparseft.evaluation.target import find_target
from sparseft.training import checks


def run(
    config: RunConfig,
    *,
    run: str | None = None,
    adapter: str | None = None,
    base: bool = False,
    overrides: Sequence[str] = (),
    as_json: bool = False,
) -> Any:
    """Loads who answers: voices, for `render` to talk to; with `as_json` the talk, read from stdin, as a result."""
    console.clear_warnings()
    checks.check_one_process(config, "chat")
    target = find_target(config, run=run, adapter=adapter, base=base, overrides=overrides)
    torch.manual_seed(config.seed)  # of sampling
    voices = Voices(target, config, overrides, is_base=adapter is None and target.folder is None)
    if not as_json:
        return voices
    # What is printed here goes to stderr.
    talk = Talk(voices, Terminal() if sys.stdin.isatty() and sys.stderr.isatty() else Silent())
    talk.run()
    return {
        "talked_to": target.what,
        "prompt": voices.first.form.name,
        "turns": talk.turns,
        "saved": [str(path) for path in dict.fromkeys(talk.saved)],
    }


def render(voices: Voices) -> None:
    """The talk itself: answers on stdout as they come."""
    Talk(voices, Terminal() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()).run()
