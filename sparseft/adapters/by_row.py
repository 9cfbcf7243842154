"""`adapter_names`: a batch in which each row has an adapter of its own, or none.

A model with adapters takes `model(…, adapter_names=["math", None])` and `model.generate(…, adapter_names=[…])`: a hook
takes the names out of the arguments, and for the time of the call the kind of the adapters sees to the rows.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.state import BASE, state_of
from sparseft.errors import UserError

ARGUMENT = "adapter_names"
Rows = tuple[str | None, ...]
_INPUTS = ("input_ids", "inputs_embeds", "inputs")


@dataclass
class Call:
    """A call whose rows have adapters of their own: one forward pass, or `generate` with many."""

    model: nn.Module
    names: Rows
    forward: bool  # one pass; else `generate`
    now: tuple[Rows, int] = ((), 0)  # of the pass that runs: the names, and how many tokens each row has
    leave: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_call: ContextVar[Call | None] = ContextVar("sparseft_rows", default=None)  # by thread, as models are called


class _Eager:
    """While any thread is inside, nothing compiled is used.

    The compiler's stance is the process's, not the thread's: threads that each restored what they had found would
    leave it changed, where one came after another and went later.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.first: Any = None  # holds the stance before

    def __enter__(self) -> None:
        with self.lock:
            try:
                stance = torch.compiler.set_stance("force_eager")
            except RuntimeError:  # within a call of what was compiled
                raise _untraceable() from None
            if not self.inside:
                self.first = stance
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.first.__exit__(None, None, None)


_eager = _Eager()


def listen(model: nn.Module) -> None:
    """Lets a model that has adapters take `adapter_names`."""
    if any(hook is _before for hook in model._forward_pre_hooks.values()):
        return
    model.register_forward_pre_hook(_before, with_kwargs=True)
    model.register_forward_hook(_after, always_call=True)
    if hasattr(type(model), "generate") and "generate" not in vars(model):
        model.generate = functools.partial(generate, model)  # type: ignore[assignment]  # a method is lost by pickle


def ignore(model: nn.Module) -> None:
    """Takes back `listen`."""
    for hooks, own in ((model._forward_pre_hooks, _before), (model._forward_hooks, _after)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                flags.pop(key, None)
    method = vars(model).get("generate")
    if getattr(method, "func", None) is generate:
        del model.generate


def generate(model: Any, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
    """The model's own `generate`, each row of the batch with the adapter of its name (None: the base).

    Beams and several sequences of one row have the adapter of that row.
    """
    own = type(model).generate
    if adapter_names is None:
        return own(model, *args, **kwargs)
    call = Call(model, _checked(model, adapter_names, args, kwargs), forward=False)
    token = _call.set(call)
    try:
        with call.leave:
            return own(model, *args, **kwargs, **_enter(call))
    finally:
        _call.reset(token)


def names_of_rows(names: Rows, rows: int) -> Rows:
    """`names` for a batch of `rows`: as `generate` repeats its rows for beams and several sequences."""
    each, rest = divmod(rows, len(names))
    if rest or not each:
        raise UserError(f"{ARGUMENT}: {len(names)} names for a batch of {rows} rows.")
    return names if each == 1 else tuple(name for name in names for _ in range(each))


def shape_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many rows, and tokens of each, a forward pass or `generate` was given; zeros where it was given none."""
    given = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    batches = (value for value in given if isinstance(value, Tensor) and value.dim() >= 2)
    return next(((value.shape[0], value.shape[1]) for value in batches), (0, 0))


def _checked(model: Any, names: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Rows:
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise UserError(f"{ARGUMENT}: expected a list with a name or None for each row of the batch, got {names!r}.")
    names = tuple(None if name == BASE else name for name in names)
    state = state_of(model)
    assert state is not None
    for name in names:
        if name is not None:
            state.kind.check_name(model, name)
    rows, _ = shape_of(args, kwargs)
    if len(names) != rows:
        raise UserError(f"{ARGUMENT}: {len(names)} names for a batch of {rows} rows.")
    if model.training:
        raise UserError(f"{ARGUMENT} is for using adapters, not for training them: call model.eval() first.")
    return names


def _enter(call: Call, tokens: int = 0) -> dict[str, Any]:
    """The kind of the adapters sees to the rows until `call.leave` is closed; what the model is to be given."""
    if torch.compiler.is_compiling():
        raise _untraceable()
    state = state_of(call.model)
    assert state is not None
    call.now = call.names, tokens
    if "torch._dynamo" in sys.modules:  # what was compiled calls no hook that came later
        call.leave.enter_context(_eager)

    def now() -> tuple[Rows, int] | None:
        return call.now if _call.get() is call else None

    try:
        return call.leave.enter_context(state.kind.by_row(call.model, state, call.names, now))
    except BaseException:  # `_after` knows nothing of a pass that was refused
        call.leave.close()
        raise


def _untraceable() -> UserError:
    return UserError(f"{ARGUMENT} cannot be compiled: call the model that was given to torch.compile.")


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Ahead of a forward pass."""
    names = kwargs.get(ARGUMENT)
    if torch.compiler.is_compiling():
        if names is not None:
            raise _untraceable()
        return None
    current = _call.get()
    if current is not None and current.model is model:  # a pass of `generate`
        rows, tokens = shape_of(args, kwargs)
        current.now = names_of_rows(current.names, rows), tokens
        return None
    if names is None:
        return None
    rest = {key: value for key, value in kwargs.items() if key != ARGUMENT}
    call = Call(model, _checked(model, names, args, rest), forward=True)
    rest |= _enter(call, shape_of(args, rest)[1])
    _call.set(call)
    return args, rest


def _after(model: nn.Module, *_: Any) -> None:
    """After a forward pass, also one that failed."""
    if torch.compiler.is_compiling():
        return
    call = _call.get()
    if call is not None and call.forward and call.model is model:
        _call.set(None)
        call.leave.close()
