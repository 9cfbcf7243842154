"""Who answers: the base model and the adapters on it, or a model that was trained whole; loaded and switched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.adapters.description import read_config
from sparseft.adapters.lifecycle import load_adapter, set_adapter
from sparseft.adapters.state import state_of
from sparseft.chat.answer import Memory, set_up
from sparseft.chat.form import Form, find_form
from sparseft.config import ModelConfig, RunConfig
from sparseft.data.encoding import Encoder, generation_ends
from sparseft.data.templates import end_of_turn
from sparseft.errors import UserError, nearest, nearest_path, shown, where_looked
from sparseft.evaluation.target import Target, find_target, load_target
from sparseft.models.loading import load_tokenizer
from sparseft.runs import folder as runs

BASE = "base"  # how the base model is called


@dataclass
class Voice:
    """One who answers.

    adapter: its name on the base model; None: the base itself, or one with a model of its own (`model`).
    """

    name: str
    what: str  # as a sentence calls it
    form: Form
    adapter: str | None = None
    model: Any = None
    memory: Memory = field(default_factory=Memory)


class Voices:
    """The base model and who was trained from it, by name in the order of loading; each loaded once it is needed.

    target: who answers at first; is_base: it is the base itself.
    """

    def __init__(self, target: Target, config: RunConfig, overrides: Sequence[str] = (), *, is_base: bool) -> None:
        self.config, self.overrides = config, overrides
        self.trained: dict[str, Voice] = {}
        self.tokenizer: Any = None
        self._tokenizer_place: str | None = None  # the folder or id that it is of
        self._base: ModelConfig | None = target.base  # None: not known yet
        self._attached: Any = None  # the base model, with the adapters that were loaded
        self._peft: bool | None = None  # whether those are peft's; None: there is none
        self._places: dict[Path, str] = {}  # names by the folders that were loaded
        self._chosen: Voice | None = None  # of the trained ones, the last
        if is_base:
            self._load_base(target.model, target.what)
            self.first = self.base()
        else:
            self.first = self.choose(self._add(target))

    def base(self) -> Voice:
        """The base model, asked in the form of the trained one beside it; UserError where it is not known."""
        if self._base is None:
            raise UserError(
                f"the folder of '{next(iter(self.trained))}' does not say what it was before training, so there is no "
                "base to ask."
            )
        if self._attached is None:
            self._load_base(self._base, f"the base model {self._base.path}")
        self._base_voice.form = self._chosen.form if self._chosen is not None else self._own_form
        return self._base_voice

    def choose(self, name: str | None = None) -> Voice:
        """The trained one of that name, or of that folder, which is loaded; None: the one that was chosen last."""
        if name is None and self._chosen is None:
            raise UserError("no adapter is loaded yet: /adapter FOLDER loads one.")
        if name is not None and name not in self.trained:
            name = self._open(name)
        if name is not None:
            self._chosen = self.trained[name]
        assert self._chosen is not None
        return self._chosen

    def model(self, voice: Voice) -> Any:
        """The model that answers as `voice`, with its adapter active."""
        if voice.model is not None:
            return voice.model
        if state_of(self._attached) is not None:
            set_adapter(self._attached, voice.adapter)
        return self._attached

    def _open(self, name: str) -> str:
        """Loads a run's or an adapter's folder; returns the name that it has from now on."""
        path = Path(name).expanduser()
        if not path.is_dir():
            near = nearest(name, self.trained)
            hint = near if near.startswith(" Did") else nearest_path(name) or near
            raise UserError(f"no adapter is called '{name}', and there is no such folder{where_looked(name)}.{hint}")
        run = runs.is_run(path) and not runs.is_checkpoint(path)
        given = {"run": name if run else None, "adapter": None if run else name}
        target = find_target(self.config, **given, base=False, overrides=self.overrides)
        return self._places.get(_place(target).resolve()) or self._add(target)

    def _load_base(self, base: ModelConfig, what: str) -> None:
        self._attached = self._load(Target(what, base, None, None))
        self._base = base
        self._own_form = find_form(self.config.chat.prompt, self.tokenizer, None)
        self._base_voice = Voice(BASE, what, self._own_form)

    def _add(self, target: Target) -> str:
        """Loads who was trained; returns the name."""
        own = model = None
        if target.adapter is None:
            self._check_tokenizer(target, target.model)
            model = self._load(target)
        else:
            base = self._base or target.model
            self._check_shared(target, base)
            if self._attached is None:
                self._load_base(base, f"the base model {base.path}")
            peft = "peft_type" in read_config(target.adapter)
            apart = self._peft not in (None, peft)  # the two kinds cannot share a model
            console.log(f"loading {target.adapter}{' on a copy of the base, for its kind' if apart else ''}")
            if not apart:
                own = f"chat-{len(self.trained)}"  # not the folder's name, as peft allows few
                self._attached = load_adapter(self._attached, target.adapter, own).eval()
                self._peft = peft
            else:
                model = self._load(replace(target, model=base))
        place = _place(target)
        form = find_form(self.config.chat.prompt, self.tokenizer, target.told)
        name = self._new_name(place)
        self.trained[name] = Voice(name, target.what, form, own, model)
        self._places[place.resolve()] = name
        return name

    def _check_shared(self, target: Target, base: ModelConfig) -> None:
        """Refuses an adapter whose folder names another base, where it holds no fingerprint by which loading knows the
        base, as PEFT's own; and one with another tokenizer."""
        assert target.adapter is not None
        content = read_config(target.adapter)
        known = "base_fingerprint" in (content.get("sparseft") or content)
        if not known and _named(target.model.path) != _named(base.path):
            raise UserError(
                f"{target.adapter} was made for the base {shown(target.model.path)}, and this talk's is "
                f"{base.path}; if they are the same, start it with model.path=FOLDER, for all of them."
            )
        # On the same weights it has their tokenizer; by the name that its folder gives them they may not be here.
        same = known and target.model.tokenizer is None
        self._check_tokenizer(target, replace(base, tokenizer=None) if same else target.model)

    def _check_tokenizer(self, target: Target, model: ModelConfig) -> None:
        """Refuses one whose tokenizer, that of `model`, makes something else of a talk than everyone's."""
        if self.tokenizer is None or self._tokenizer_place == (model.tokenizer or model.path):
            return
        if _facts(load_tokenizer(model)) != _facts(self.tokenizer):
            option = f"--{'adapter' if target.folder is None else 'run'} {_place(target)}"
            raise UserError(
                f"{target.what} was trained with another tokenizer or chat template than this talk's: sparseft chat "
                f"{option} talks to it."
            )

    def _load(self, target: Target) -> Any:
        """A model of its own, set up for answers; the first tokenizer is everyone's."""
        console.log(f"loading {target.model.path}")
        model, tokenizer = load_target(target, self.config)
        if self.tokenizer is None:
            self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
            self._tokenizer_place = target.model.tokenizer or target.model.path
        ends = generation_ends(tokenizer) | end_of_turn(tokenizer)
        set_up(model, self.config.chat.temperature, self.config.chat.max_new_tokens, ends)
        return model

    def _new_name(self, place: Path) -> str:
        """The run's or the adapter's folder, without date and time, as a name that nobody has."""
        place = place.resolve()
        bare = re.sub(r"^\d{8}-\d{6}-", "", place.parent.name if place.name == runs.ADAPTER else place.name)
        name = bare = "-".join(re.findall(r"[\w.]+", bare)) or "adapter"
        number = 1
        while name in self.trained or name == BASE:
            number += 1
            name = f"{bare}-{number}"
        return name


def _named(path: str) -> str | Path:
    """What a model is called by: its folder, else its id."""
    folder = Path(path).expanduser()
    return folder.resolve() if folder.is_dir() else path


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    """What a tokenizer makes of a talk."""
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)
    return tokenizer.get_vocab(), tokenizer("User: a\n\nb").input_ids, *ends


def _place(target: Target) -> Path:
    """The folder of who was trained: the run's, the adapter's or the whole model's."""
    return target.folder or target.adapter or Path(target.model.path)
