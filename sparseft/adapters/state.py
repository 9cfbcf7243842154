"""What an attached model remembers, and what adapters of every kind can do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sparseft.adapters.units import Units
from sparseft.errors import UserError, local_name, nearest
from sparseft.methods.base import MethodConfig
from sparseft.models.decoder import STATE
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.packed.quantized import check_plain
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection

DEFAULT = "default"
BASE = "__base__"  # how peft spells None among the names of a batch's rows
Names = Sequence[str | None]  # of the adapters of a batch's rows; None: the base
Now = Callable[[], tuple[Names, int] | None]


class Kind:
    """How adapters of one kind are put on a model and taken off it again, and what it takes to do so for one model.

    `sparse.py`, `peft.py` and `full.py` have one each; `lifecycle.py` picks it. All raise `UserError` where a name is
    unknown, files do not fit, or the kind has no such thing.
    """

    trains_all: ClassVar[bool] = False  # whether what trains is the model itself
    called: ClassVar[str]  # its adapter, in a message

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: MethodConfig,
        selection: Selection | None,
        spec: ModelSpec | None,
        fingerprints: list[str] | None = None,
    ) -> nn.Module:
        """Makes a plain model trainable and returns it, or what wraps it.

        spec, fingerprints: the model's (`base_fingerprints`), where the caller has them.
        """
        raise NotImplementedError

    @classmethod
    def load(
        cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str, keep: str, activate: bool
    ) -> nn.Module:
        """Loads an adapter's folder, described by `content`, onto a plain or attached model; `keep` is one of
        `waiting.KEEP`. It becomes the active one (`activate`), or that stays which was."""
        raise NotImplementedError

    def names(self, model: nn.Module) -> Collection[str]:
        """The adapters that the model has."""
        raise NotImplementedError

    def save(
        self, model: nn.Module, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None
    ) -> None:
        """Writes the adapter `name` into an existing folder; `state_dict` is for a whole model in shards."""
        raise NotImplementedError

    def switch(self, model: nn.Module, state: State, name: str | None) -> None:
        """Makes the adapter `name` the active one; None: the base, bit for bit."""
        raise NotImplementedError

    def fuse(self, model: nn.Module, state: State, weights: dict[str, float], name: str) -> None:
        """Adds the weighted sum of adapters as `name`, which becomes the active one."""
        raise NotImplementedError

    def leave(self, model: nn.Module, state: State, *, merged: bool) -> nn.Module:
        """The plain model, with the active adapter in its weights (`merged`) or as before it was attached."""
        raise NotImplementedError

    def units(self, model: nn.Module, state: State) -> dict[str, Units]:
        """The units of the active adapter, by the name of the parameter that holds them."""
        raise NotImplementedError

    def unmergeable(self, model: nn.Module, state: State) -> str | None:
        """Why the active adapter cannot become weights of the plain model; None: it can."""
        return None

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        """Fills what trains from a folder that the same method saved, in place; a model in shards too."""
        raise NotImplementedError

    def by_row(
        self,
        model: nn.Module,
        state: State,
        names: Names,
        now: Now,
    ) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Inside, each row of a batch has the adapter of its own name (None: the base); gives what the model is to be
        passed for that.

        `now` says the names of the pass that runs, which may have more rows, and how many tokens each row has there;
        None where the pass is another thread's.
        """
        raise NotImplementedError

    def there(self, state: State) -> str:
        """What keeps adapters of other kinds from such a model, in a message."""
        return f"{state.method} attached"

    def check_name(self, model: nn.Module, name: str) -> None:
        """Refuses a name that no adapter has."""
        if name not in (known := self.names(model)):
            raise UserError(f"no adapter is called '{name}'.{nearest(name, known)}")


@dataclass
class State:
    """What an attached model remembers: its base, the kind of its adapters, which is active, the flags to put back."""

    kind: Kind
    method: str
    fingerprints: list[str]  # `base_fingerprints`
    dtype: str  # of the base as it was loaded
    base_model: str
    requires_grad: dict[str, bool]
    spec: ModelSpec | None = None  # None: nothing has asked for it
    config: MethodConfig | None = None  # with what it left to the model; None: the adapter was loaded
    active: str | None = None
    method_config: dict[str, Any] = field(default_factory=dict)  # of what was attached, with what it left to the model

    @staticmethod
    def of(
        model: nn.Module,
        kind: Kind,
        method: str,
        spec: ModelSpec | None = None,
        fingerprints: list[str] | None = None,
    ) -> State:
        """The state of a model about to be attached."""
        check_plain(model)
        name = getattr(model, "name_or_path", "") or ""
        return State(
            kind=kind,
            method=method,
            fingerprints=base_fingerprints(model) if fingerprints is None else fingerprints,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            base_model=local_name(name) if os.path.isdir(name) else name,
            requires_grad={name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
            spec=spec,
        )

    @property
    def header(self) -> dict[str, Any]:
        """What an adapter's description says of the base and of the method."""
        first, *others = self.fingerprints
        header = {"base_model": self.base_model, "base_fingerprint": first, "base_dtype": self.dtype}
        if others:
            header["other_fingerprints"] = others
        return header | {"method": self.method, "method_config": self.method_config}


def check_new_name(name: str) -> None:
    """Refuses a name that an adapter cannot be asked for by."""
    if not isinstance(name, str) or name in ("", BASE):
        raise UserError(f"an adapter cannot be called {name!r}: expected a text that is not empty and not '{BASE}'.")


def state_of(model: nn.Module) -> State | None:
    """The state of an attached model, or None of a plain one."""
    return getattr(model, STATE, None)


def require_state(model: nn.Module) -> State:
    """The state of an attached model; a plain one is a `UserError`."""
    state = state_of(model)
    if state is None:
        raise UserError("the model has no adapter: attach one or load one first.")
    return state


def state_for(model: nn.Module, kind: type[Kind], folder: Path) -> State | None:
    """The state of a model that an adapter of `kind` is loaded onto, None of a plain one; refuses any other model."""
    state = state_of(model)
    if state is not None and not isinstance(state.kind, kind):
        raise UserError(f"{folder}: {kind.called} cannot be loaded onto a model with {state.kind.there(state)}.")
    if state is None and hasattr(model, "peft_config"):
        raise UserError(f"{folder}: {kind.called} cannot be loaded onto a model with peft's layers: merge it first.")
    return state
