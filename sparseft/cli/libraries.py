"""How the command line loads the libraries of a command: without looking for garbage, and without what nobody uses."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.abc import MetaPathFinder
from typing import Any


def load(name: str) -> Any:
    """Imports a module of a command with all its libraries."""
    if "torch" in sys.modules:  # a program's own, or another command's
        return importlib.import_module(name)
    with uncollected(), asking_late():
        return importlib.import_module(name)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage, and what was made is never looked at again.

    For imports: torch and transformers are close to a million objects, all of which stay. To go through them over and
    over took a sixth of the time to a run's first step, 0.2 s now and then in the steps, and a second at the end.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(_ready_to_end)
        if collects:
            gc.enable()


def _ready_to_end() -> None:
    if "triton._C.libtriton" in sys.modules:  # complains of what of it is left when Python ends
        gc.unfreeze()


# ---- packages that transformers imports because they are installed ----


@dataclass(frozen=True)
class Question:
    """What modules of transformers ask while they are imported, and take of a package where the answer is yes."""

    function: str  # of transformers.utils
    askers: tuple[str, ...]
    taken: dict[str, tuple[str, str]]  # by their name for it: the module, and what of that ("": the module itself)
    unasked: bool = False  # it is a function, called later without asking again


QUESTIONS = (
    Question(
        "is_peft_available",
        ("transformers.trainer", "transformers.trainer_utils"),
        {"PeftModel": ("peft", "PeftModel"), "PeftMixedModel": ("peft", "PeftMixedModel")},
    ),
    Question("is_datasets_available", ("transformers.trainer",), {"datasets": ("datasets", "")}),
    Question(
        "is_scipy_available",
        ("transformers.loss.*",),
        {"linear_sum_assignment": ("scipy.optimize", "linear_sum_assignment")},
        unasked=True,
    ),
)


@contextlib.contextmanager
def asking_late() -> Iterator[None]:
    """Inside, transformers' Trainer and its losses are imported without peft, datasets (with pandas and pyarrow) and
    scipy, unless these are loaded: an eighth of the time to a run's first step.

    They would import them wherever they are installed, to ask later whether a model is PEFT's, or examples are
    datasets'. Nothing can be as long as the package is not loaded: so from now on these modules ask for that, and know
    what has been loaded by then, by whomever. The losses call scipy without asking: the first call loads it. All other
    modules get the answers that they always got. A transformers that asks in another way is left to it, which takes
    the time and nothing else.
    """
    finder = _Asking()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Asking(MetaPathFinder):
    """Finds nothing. It sees that a module that asks is about to be imported, when transformers.utils is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name in ("transformers.trainer", "transformers.trainer_utils", "transformers.loss"):
            for question in QUESTIONS:
                plain = getattr(sys.modules["transformers.utils"], question.function, None)
                if plain is not None and not isinstance(plain, _Late):
                    setattr(sys.modules["transformers.utils"], question.function, _Late(question, plain))


@dataclass(frozen=True)
class _Late:
    """Answers a question: to its askers, whether what they take is loaded, which they then have; to others as ever."""

    question: Question
    plain: Callable[[], bool]

    def __call__(self) -> bool:
        asker = sys._getframe(1).f_globals
        if not any(fnmatchcase(asker["__name__"], name) for name in self.question.askers):
            return self.plain()
        found = {name: _loaded(*where) for name, where in self.question.taken.items()}
        if any(thing is None for thing in found.values()):
            if self.question.unasked:
                asker.update({name: _loading(*where) for name, where in self.question.taken.items()})
            return False
        asker.update(found)
        return True


def _loaded(module: str, attribute: str) -> Any:
    """What is asked for, or None where it is not loaded (yet)."""
    there = sys.modules.get(module)
    return getattr(there, attribute, None) if attribute else there


def _loading(module: str, function: str) -> Callable[..., Any]:
    """A function that is imported when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **options)

    return call
