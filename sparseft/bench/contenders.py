"""One method's model and optimizer, made for measuring, and the ways in which its step is run.

`floor` is the same model frozen, with the gradient flowing to the embeddings: what fine-tuning in place cannot beat
unless layers need no backward at all. No method has dropout; all use AdamW: sparse methods the one that training takes
for them, the others torch's fused one.

A way of running the step is `eager`, or parts joined by `+`: `labelled`, `compile`, `liger`, `checkpointing`,
`selective` and `selective_up`, or single kinds of what these compute again (`training/recomputing.py`). It is applied
to every contender alike, the floor included, so that no method gets a favour the others lack; but one that is named
with `loss=plain` keeps the logits of all tokens in a way with `labelled`: to compare with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.adapters.lifecycle import attach, trainable_count, trainable_parameters
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import held_bytes, peak_bytes
from sparseft.compose import overrides, validation
from sparseft.config import HardwareConfig, RunConfig
from sparseft.errors import UserError, nearest
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.memory import SavedBytes, tensor_bytes
from sparseft.methods import get_method
from sparseft.methods.base import MethodConfig
from sparseft.models.labelled_loss import ROWS, label_rows, labelled_loss, why_plain
from sparseft.models.masks import unasked
from sparseft.models.spec import ModelSpec
from sparseft.rules import field_types, is_text
from sparseft.training.compiling import BACKEND
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.recomputing import CHEAP, KINDS, UP, recomputing

FLOOR = "floor"
EAGER = "eager"
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused")
PLAIN = "loss=plain"
RECOMPUTED = {**KINDS, **{kind: (kind,) for kind in (*CHEAP, UP)}}  # by part of a way
WAY_PARTS = ("labelled", "compile", "liger", "checkpointing", *RECOMPUTED)
# Contenders of one way share the code that is compiled, each with a model of its own.
RECOMPILE_LIMIT = 64


@dataclass
class Contender:
    """One method's model, optimizer and measurements."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    trainable: int
    call: Callable[..., Any] | None = None  # what runs in the model's place (it, compiled); None: the model
    recomputed: tuple[str, ...] = ()  # kinds of what the backward pass computes again
    labelled: bool = False  # the head runs on those tokens alone that predict a label
    rows: Tensor | None = None  # which these are, of the one batch that all steps take
    facts: dict[str, Any] = field(default_factory=dict)  # further figures of its row
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int | None = None  # None: not counted
    peak_bytes: int | None = None
    weights: SharedWeights | None = None  # None: its own

    @property
    def is_floor(self) -> bool:
        return self.name.partition(" ")[0] == FLOOR

    def take_turn(self) -> None:
        """Ahead of its steps, so that none of them takes the time: the shared weights are as this one has trained
        them. It changes nothing in the middle of a turn."""
        if self.weights is not None:
            self.weights.give(self.model)

    def free(self) -> None:
        """Lets go of model and optimizer, which must not have the turn; its figures stay."""
        assert self.weights is None or self.weights.holder is not self.model
        self.model, self.optimizer, self.call = nn.Module(), None, None


def check_methods(entries: Sequence[str]) -> None:
    """Refuses no entries of `bench.methods`, and one twice."""
    if not entries or len(set(entries)) != len(entries):
        raise UserError("bench.methods: expected one or more different methods.")


def own_settings(entries: Sequence[str], losses: bool = False) -> dict[str, dict[str, Any]]:
    """The settings in entries of `bench.methods` such as `lora rank=16`, checked, by entry.

    losses: whether `loss=plain` may be among them, which is no setting of the method.
    """
    own: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, *words = entry.split()
        words = [word for word in words if not (losses and word == PLAIN)]
        if not words:
            continue
        if name == FLOOR:
            raise UserError(f"bench.methods: '{entry}': the floor trains nothing and has no settings.")
        hints, values = field_types(get_method(name)), {}
        for word in words:
            if "=" not in word:
                raise UserError(f"bench.methods: '{word}' of '{entry}' is not a setting: expected key=value.")
            override = overrides.parse(word.removeprefix("method."))
            if override.key not in hints:
                raise UserError(f"bench.methods: {name} has no setting '{override.key}'.{nearest(override.key, hints)}")
            text = is_text(hints[override.key])
            read = overrides.text_value(override) if text else overrides.parsed_value(override, hints[override.key])
            values[override.key] = read
        validation.build(get_method(name), values, f"bench.methods: {name}").validate()
        own[entry] = values
    return own


def settings_of(config: RunConfig, losses: bool = False) -> dict[str, dict[str, Any]]:
    """`own_settings` of `bench.methods`, each checked together with what the run's own settings leave in force."""
    own = own_settings(config.bench.methods, losses)
    for entry in config.bench.methods:
        if (name := entry.split()[0]) == FLOOR:
            continue
        try:
            method_config(name, config, own.get(entry)).validate()
        except UserError as error:
            raise UserError(f"bench.methods: '{entry}': {error}") from None
    return own


def method_config(name: str, config: RunConfig, own: Mapping[str, Any] | None = None) -> Any:
    """The run's own settings for its method, the defaults for the others; nothing that needs data, no dropout.

    `own` are the contender's, which win: with a budget of its own (a rank, ratios) the run's sparsity does not count.
    """
    cls = get_method(name)
    own = dict(own or {})
    settings = dataclasses.asdict(config.method) if name == config.method_name else {}
    for key, value in (("sparsity", config.sparsity), ("scope", config.scope)):
        if key in {f.name for f in dataclasses.fields(cls)} and value is not None:
            settings[key] = value
    made = cls(**settings | own)
    if "sparsity" in settings and own and "sparsity" not in own and cls(**own).wanted_sparsity is None:
        made.sparsity = None
    return made.for_benchmark()


def owns_weights(entry: str) -> bool:
    """Whether the method that `entry` starts with trains the weights themselves, so that it needs its own."""
    name = entry.split()[0]
    return name != FLOOR and get_method(name).trains_all


def contender(entry: str, weights: SharedWeights, config: RunConfig, own: Mapping[str, Any] | None = None) -> Contender:
    """A copy of a plain model made trainable by the method that `entry` starts with, with its optimizer; it has the
    turn, and storages of its own for what it trains only (`owns_weights`: for all).

    own: settings of the method, as the rest of the entry gives them.
    """
    name = entry.split()[0]
    return made_trainable(entry, weights, None if name == FLOOR else method_config(name, config, own))


def made_trainable(name: str, weights: SharedWeights, method: MethodConfig | None) -> Contender:
    """`contender`, by the settings of its method; None: the floor."""
    own = method is not None and method.trains_all
    model = weights.copy(own=own)
    shares = None if own else weights
    if method is None:
        return Contender(name, model.requires_grad_(False).train(), None, 0, weights=shares)
    if shares is not None:
        shares.claim(model)
    # With the spec nothing warns that these steps choose nothing anew.
    model = attach(model, method, spec=ModelSpec.of(model) if method.sparse else None).train()
    parameters = list(trainable_parameters(model).values())
    optimizer: torch.optim.Optimizer
    if method.sparse:  # as training does
        optimizer = SparseAdamW(parameters, lr=1e-4, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    return Contender(name, model, optimizer, trainable_count(model), weights=shares)


def loss_of(c: Contender, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch; the floor's gradient begins at its embeddings.

    They are looked up before the model is called: a compiler cannot follow a tensor that begins to ask for a gradient.
    """
    c.take_turn()
    laid = tuple(batch)
    if c.is_floor:
        embedded = c.model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        batch = {"inputs_embeds": embedded, **{name: value for name, value in batch.items() if name != "input_ids"}}
    with unasked(laid), recomputing(c.model, c.recomputed) if c.recomputed else contextlib.nullcontext():
        if c.labelled:
            if c.rows is None:
                c.rows = label_rows(batch["labels"])
            with labelled_loss(c.model):
                return c.model(**batch, **{ROWS: c.rows}, use_cache=False).loss
        return (c.model if c.call is None else c.call)(**batch, use_cache=False).loss


def step(c: Contender, batch: dict[str, Tensor], accumulation: int = 1, clipped: float | None = None) -> None:
    """One optimizer step: `accumulation` times forward and backward, then the update (the floor has none).

    clipped: the norm to which the gradient is clipped first (`inf`: it is taken alone); None: not even that."""
    for _ in range(accumulation):
        loss_of(c, batch).backward()
    if c.optimizer is not None:
        if clipped is not None:
            nn.utils.clip_grad_norm_(c.model.parameters(), clipped)
        c.optimizer.step()
        c.optimizer.zero_grad(set_to_none=True)


def measure_memory(
    c: Contender, batch: dict[str, Tensor], device: torch.device, accumulation: int = 1, recomputes: bool = False
) -> None:
    """Saved bytes of a forward pass, and the peak of a step: the method's resident tensors plus what the step adds.

    recomputes: something is recomputed in the backward pass: autograd does not see what is kept for that.
    """
    c.take_turn()
    if recomputes:
        c.saved_bytes = held_bytes(lambda: loss_of(c, batch), device)
    else:
        saved = SavedBytes(c.model)
        with saved.counting():
            loss = loss_of(c, batch)
        c.saved_bytes = saved.total
        del loss
    states = c.optimizer.state.values() if c.optimizer is not None else ()
    state = [value for entry in states for value in entry.values() if isinstance(value, Tensor)]
    resident = tensor_bytes([*c.model.parameters(), *c.model.buffers(), *state])
    c.peak_bytes = resident + peak_bytes(lambda: step(c, batch, accumulation), device)


class NotAvailable(Exception):
    """A way that cannot be had for a contender, and why; the row says so."""


def parts_of(way: str) -> tuple[str, ...]:
    """`liger+compile` -> its parts; none of `eager`."""
    return () if way == EAGER else tuple(way.split("+"))


def check_ways(chosen: Sequence[str]) -> None:
    """Refuses `bench.ways` that are none, no ways, or twice the same."""
    known = f"eager, or {', '.join(WAY_PARTS)}, or several of these joined by +"
    if not chosen:
        raise UserError(f"bench.ways is empty: expected one or more of {known}.")
    for way in chosen:
        named = parts_of(way)
        if EAGER in named:
            raise UserError(f"bench.ways: '{way}': eager is the plain way, which is joined with nothing.")
        if "" in named:
            raise UserError(f"bench.ways: '{way}' has nothing beside a +: expected {known}.")
        for part in named:
            if part not in WAY_PARTS:
                raise UserError(
                    f"bench.ways: unknown way '{part}': expected {known}.{nearest(part, (EAGER, *WAY_PARTS))}"
                )
        if "labelled" in named and {"compile", "liger"} & set(named):
            raise UserError(
                f"bench.ways: '{way}': labelled runs the head in its own way, which joins checkpointing only."
            )
        if set(RECOMPUTED) & set(named) and {"compile", "checkpointing"} & set(named):
            raise UserError(
                f"bench.ways: '{way}': compile and checkpointing decide by themselves what is computed again."
            )
        if len(set(named)) != len(named):
            raise UserError(f"bench.ways: '{way}' names a part twice.")
    for before, way in itertools.combinations(chosen, 2):
        if set(parts_of(before)) == set(parts_of(way)):
            same = f"'{way}' is named twice" if before == way else f"'{before}' and '{way}' are the same"
            raise UserError(f"bench.ways: {same}.")


def check_steps(config: RunConfig, choosable: bool = True) -> None:
    """`check_run_as`, and refuses what no timed step does."""
    if config.trainer.optimizer not in PLAIN_ADAMW:
        raise UserError(
            f"trainer.optimizer={config.trainer.optimizer}: the steps that a benchmark times are AdamW's: leave it out."
        )
    if smoothing := config.trainer.label_smoothing:
        raise UserError(f"trainer.label_smoothing={smoothing:g}: no step that a benchmark times has it: leave it out.")
    if (average := config.trainer.average) is not None:
        raise UserError(
            f"trainer.average={average}: its pass in each step is in no timed step, and its loss is known at the end "
            "alone: leave it out."
        )
    check_run_as(config, choosable)


def check_run_as(config: RunConfig, choosable: bool = True) -> None:
    """Refuses settings of runs that say what only `bench.ways` says, how the step is run.

    choosable: whether the benchmark has ways to choose from.
    """
    hardware, trainer = config.hardware, config.trainer
    by_hardware = trainer.checkpointing == "auto" and hardware.gradient_checkpointing
    asked = []  # (part of a way, what asks for it, what does not)
    if by_hardware:
        asked.append(("checkpointing", "hardware.gradient_checkpointing=true", "hardware.gradient_checkpointing=false"))
    elif config.checkpointing != "none":
        part = "checkpointing" if config.checkpointing == "full" else config.checkpointing
        asked.append((part, f"trainer.checkpointing={config.checkpointing}", "trainer.checkpointing=none"))
    if trainer.compile != "none":
        asked.append(("compile", f"trainer.compile={trainer.compile}", "trainer.compile=none"))
    if asked:
        parts = [part for part, _, _ in asked]
        given, instead = " and ".join(on for _, on, _ in asked), " ".join(off for _, _, off in asked)
        if hardware.name != HardwareConfig.name and by_hardware:  # not typed, maybe
            given += f" (hardware={hardware.name} may say so)"
        if not choosable:
            raise UserError(f"{given}: this benchmark runs plain steps only: give {instead}.")
        raise UserError(
            f"{given}: how benchmarks run a step is what bench.ways says: use 'sparseft bench train "
            f"bench.ways=[{'+'.join(parts)}]' with {instead}."
        )


def put_in_way(way: str, c: Contender, first_step: Callable[[], Any]) -> None:
    """Makes `c` run in this way. first_step: runs a step, in which a compiler does its work.

    Raises `NotAvailable` where it cannot be had. A compiled contender's `facts` get `compile_seconds`, `graphs`,
    `graph_breaks` and, where there are any, their `graph_break_reasons`.
    """
    chosen = parts_of(way)
    if "labelled" in chosen and PLAIN not in c.name.split():
        if reason := why_plain(c.model):
            raise NotAvailable(f"labelled: {reason}")
        c.labelled = True
    if "liger" in chosen:
        _use_liger(c)
    if "checkpointing" in chosen:  # not the reentrant kind, which reaches nothing below frozen embeddings
        c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        c.model.disable_input_require_grads()  # type: ignore[operator]  # as training does: that kind needs no gradient below
    c.recomputed = tuple({kind: None for part in chosen for kind in RECOMPUTED.get(part, ())})
    if c.recomputed:
        share_inputs_in_training(c.model)
    if "compile" in chosen:
        _compile(c, first_step)


def _use_liger(c: Contender) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotAvailable("liger-kernel is not installed")
    if next(c.model.parameters()).device.type == "cpu":
        raise NotAvailable("Liger kernels need a GPU")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls

    wrapped = getattr(c.model, "get_base_model", None)  # of PEFT
    model = wrapped() if wrapped else c.model
    names = vars(sys.modules[type(model).__module__])
    _before_liger.append((names, dict(names)))  # it exchanges functions of transformers' module too, for all models
    _apply_liger_kernel_to_instance(model=model)


_before_liger: list[tuple[dict[str, Any], dict[str, Any]]] = []  # names of a module, as they are and as they were


def forget_liger() -> None:
    """Puts back what Liger has exchanged in transformers' modules: the next way would run with it."""
    while _before_liger:
        names, before = _before_liger.pop()
        names.update(before)


def _compile(c: Contender, first_step: Callable[[], Any]) -> None:
    from torch._dynamo.exc import TorchDynamoException  # a second to load, for those who compile
    from torch._dynamo.utils import counters

    console.log(f"bench: compiling {c.name}")
    counters.clear()
    start = time.perf_counter()
    c.call = torch.compile(c.model, backend=BACKEND)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            first_step()
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip() or type(cause).__name__
        raise NotAvailable(f"torch.compile: {reason.splitlines()[0].rstrip('.: ')}") from error
    breaks = counters["graph_break"]
    c.facts |= {
        "compile_seconds": time.perf_counter() - start,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(breaks.values()),
    }
    if breaks:
        c.facts["graph_break_reasons"] = sorted({str(reason).splitlines()[0] for reason in breaks})


def forget_compiled() -> None:
    """Forgets what was compiled: the models it holds would live on."""
    torch._dynamo.reset()
