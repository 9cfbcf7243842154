"""Which layers of blocks save their whole input for the backward pass, and which a slice of their own.

A layer of blocks needs only some column blocks of its input x. A slice of these, in storage of its own, is smaller than
x, but q, k and v (gate and up) read the same x, which is kept once however many of them save it: three slices may be
more than that one. So all layers that read one input decide together, and save one slice with what any of them needs.
Where x stays in memory anyway, because a sibling that trains rows or the operation that made x saves it, a slice would
only come on top.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from sparseft.layers.joint_gradients import join
from sparseft.layers.product import SharedSlice
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.decoder import decoder_layers
from sparseft.models.spec import COLUMN_ROLES, MLP_ROLES, role_of

# Attention that saves its own result for its backward pass, in the storage that the o projection then reads.
SAVES_RESULT = ("sdpa", "flash")
# The same of activations; the gated ones are multiplied afterwards, and the product is not saved.
SAVING_ACTIVATIONS = ("relu", "tanh", "sigmoid")

_made_again = False


@contextlib.contextmanager
def inputs_made_again() -> Iterator[None]:
    """Inside, what norms and gates have made is computed again in the backward pass, so that keeping it whole costs
    nothing, and a slice of it would come on top."""
    global _made_again
    before, _made_again = _made_again, True
    try:
        yield
    finally:
        _made_again = before


def share_inputs(model: nn.Module) -> None:
    """Settles for every layer of blocks whether it saves its input or a slice, by what all of them train now.

    Together the layers that read one input then never save more than that input. To be called when patterns have
    changed; until then, and where a layer stands alone, `SLICE_SHARE` decides. Which layers make their gradients
    together is settled with it.
    """
    join(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not any("blocks" in layer.patterns for layer in layers.values()):
        return
    single = _layers_with_one_norm(model)
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[_input_of(name, layer, single)].append(name)
    for names in groups.values():
        members = {name: layers[name] for name in names}
        kept = any("rows" in layer.patterns for layer in members.values()) or _kept_by_maker(model, names[0])
        _settle(members, kept)


def share_inputs_in_training(model: nn.Module) -> None:
    """`share_inputs` ahead of the model's next forward pass that may train: looking at all layers takes longer than
    exchanging the adapter of a model that is only used. Until then gradients are right, and may save more."""
    if not any(hook is _share_now for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_share_now)


def _share_now(model: nn.Module, _inputs: Any) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        forget_sharing(model)
        share_inputs(model)


def forget_sharing(model: nn.Module) -> None:
    """Takes back `share_inputs_in_training`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _share_now:
            del model._forward_pre_hooks[key]


def _settle(members: dict[str, SparseLinear], kept: bool) -> None:
    """Of layers that read one input, which is `kept` anyway or not: all save it, or slices of it."""
    blocks = [pattern for layer in members.values() if (pattern := layer.patterns.get("blocks")) is not None]
    for pattern in blocks:
        pattern.share(None)
    needed = [pattern.needed_columns for pattern in blocks if pattern.needed_columns is not None]  # None: on meta
    width, slices = sum(map(len, needed)), None
    if len(needed) > 1 and len({pattern.block_size for pattern in blocks}) == 1 and all(map(role_of, members)):
        slices = SharedSlice(torch.cat(needed).unique().cpu())
        width = len(slices.columns)
    width *= max((pattern.block_size or 0 for pattern in blocks), default=0)
    kept = kept or width >= next(iter(members.values())).in_features
    for layer in members.values():
        layer.keeps_input = kept
    for pattern in blocks:
        pattern.share(None if kept else slices)


def _input_of(name: str, layer: SparseLinear, single: tuple[str, ...]) -> Hashable:
    """A key that layers which read the same input have in common.

    Where the names do not say it, layers of one module with as many input features count as siblings. If they are not,
    each of their inputs is kept where together their slices are no smaller than one: no more than without slices.
    """
    parent, _, leaf = name.rpartition(".")
    if leaf.isdigit():  # an expert of a 3-D parameter, or of a list: it reads tokens of its own
        parent, _, leaf = parent.rpartition(".")
        return (parent, int(name.rpartition(".")[2]), leaf if MLP_ROLES.get(leaf) in COLUMN_ROLES else None)
    if role_of(name) in COLUMN_ROLES:
        return name
    block = next((prefix for prefix in single if name.startswith(prefix)), parent)
    return (block, layer.in_features)


def _layers_with_one_norm(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of decoder layers in which attention and MLP read the output of one and the same norm."""
    if getattr(model, "config", None) is None:
        return ()
    prefix, layers = decoder_layers(model)
    return tuple(
        f"{prefix}.{index}."
        for index, layer in enumerate(layers)
        if sum("norm" in type(child).__name__.lower() for child in layer.children()) == 1
    )


def _kept_by_maker(model: nn.Module, name: str) -> bool:
    """Whether what made the input of `name` saves it for its own backward pass, or can make it again."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    config = config.get_text_config()
    if _made_again and role_of(name) not in (None, *COLUMN_ROLES):
        return True
    if role_of(name) == "o":
        return str(getattr(config, "_attn_implementation", "")).startswith(SAVES_RESULT)
    if role_of(name) == "down":
        parent = name.rpartition(".")[0]
        siblings = (f"{parent}.{child}" for child, _ in model.get_submodule(parent).named_children())
        gated = any(role_of(sibling) in ("gate", ("gate", "up")) for sibling in siblings)
        fields = ("hidden_act", "hidden_activation", "activation_function")
        activation = next((value for field in fields if (value := getattr(config, field, None))), None)
        return _made_again if gated else activation in SAVING_ACTIVATIONS
    return False
