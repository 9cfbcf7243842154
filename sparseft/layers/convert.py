"""Whole models: plain linears to sparse layers and back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import UserError, nearest
from sparseft.layers.beside import BesideLinear, stands_beside
from sparseft.layers.experts import ExpertLinear, close_experts, open_expert
from sparseft.layers.joint_gradients import separate
from sparseft.layers.kinds import BlockSparseLinear, GridLinear, S2ColumnLinear, S2RowLinear
from sparseft.layers.pattern import Pattern
from sparseft.layers.permutation import can_train
from sparseft.layers.saved_inputs import forget_sharing, share_inputs, share_inputs_in_training
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.decoder import find_expert, logical_weight, stack_parameter
from sparseft.models.packed.quantized import is_plain
from sparseft.models.packed.unquantized import Unquantized

CLASSES = {
    ("rows",): S2ColumnLinear,
    ("columns",): S2RowLinear,
    ("blocks",): BlockSparseLinear,
    ("grid",): GridLinear,
}


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Puts the second of each pair wherever the model holds the first (one module may have several names)."""
    pairs = list(pairs)  # holds what the numbers stand for
    news = {id(old): new for old, new in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in news:
                parent._modules[name] = news[id(child)]


def weight_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds the weight of the linear or the expert `name`, of an expert that of all of them."""
    expert = find_expert(model, name)
    return model.get_submodule(name).weight if expert is None else stack_parameter(expert.experts, expert.parameter)


def device_of(model: nn.Module, name: str) -> torch.device:
    """Where the linear or the expert `name` is, also one that is packed and keeps no parameter `weight`."""
    expert = find_expert(model, name)
    module = model.get_submodule(name) if expert is None else expert.experts
    return next(chain(module.parameters(), module.buffers())).device


def plain_weight(model: nn.Module, name: str) -> Tensor:
    """The logical weight (out, in) of the linear or the expert `name`, plain or sparse: a view, without gradient.

    Where it is in shards, it has to be gathered (`weight_parameter`).
    """
    expert = find_expert(model, name)
    return expert.weight if expert is not None else logical_weight(model.get_submodule(name))


def make_sparse(model: nn.Module, name: str) -> SparseLinear:
    """Puts a sparse layer without a pattern in the place of the linear or the expert `name`, and returns it."""
    expert = find_expert(model, name)
    if expert is not None:
        return open_expert(expert)
    old = model.get_submodule(name)
    new = wrapped(model, name)
    replace_modules(model, [(old, new)])
    return new


def wrapped(model: nn.Module, name: str, kinds: Iterable[str] = ()) -> SparseLinear:
    """A sparse layer around the linear `name` that is to train patterns of these kinds; none yet."""
    linear = model.get_submodule(name)
    if stands_beside(linear):
        layer = BesideLinear.wrap(linear, compute_dtype(model))
        if (unquantized := Unquantized.of(model)) is not None:
            layer.checkpoint = functools.partial(unquantized.weight, name)
        return layer
    return CLASSES.get(tuple(kinds), SparseLinear).wrap(linear)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """In what the model computes: the dtype of the first parameter that holds plain numbers."""
    return next((p.dtype for p in model.parameters() if is_plain(p)), torch.float32)


def layer_at(model: nn.Module, name: str) -> SparseLinear:
    """The sparse layer of the linear or the expert `name`, made where there is none yet."""
    module: Any = model
    for part in name.split("."):  # as `get_submodule`, which takes ten times as long: experts are found here as well
        module = module._modules.get(part) if module is not None else None
    return module if isinstance(module, SparseLinear) else make_sparse(model, name)


@torch.no_grad()
def exchange(
    model: nn.Module, old: Mapping[str, Mapping[str, Pattern]], new: Mapping[str, Mapping[str, Pattern]]
) -> None:
    """The layers that train `old` (patterns by module and kind) get the base's entries back, and then train `new`.

    Touches the layers of these two alone, and reads and writes their entries alone. Converts modules that are not
    sparse yet.
    """
    layers = {name: layer_at(model, name) for name in [*old, *(name for name in new if name not in old)]}
    if not all(
        can_train(kind, layers[name].row_permutation, layers[name].column_permutation)
        for name, kinds in new.items()
        for kind in kinds
    ):  # into the original order, all of them, because coupled layers are in one order
        for layer in sparse_layers(model).values():
            layer.permute()
    for name, layer in layers.items():
        layer.install(dict(new.get(name, {})))
    for layer in layers.values():
        if isinstance(layer, ExpertLinear) and not layer.patterns:
            close_experts(layer.experts, idle=True)  # the base's own way of computing, to the bit
    share_inputs_in_training(model)


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The modules of `names` whose weight another module uses too, with that other's parameter name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = {}
    for name in names:
        if find_expert(model, name) is None:
            linear = model.get_submodule(name)
            own, weight = f"{name}.weight", linear._parameters.get("weight")  # None: packed under another name
        else:
            own, weight = name.rpartition(".")[0], weight_parameter(model, name)
        others = [owner for owner in owners.get(id(weight), []) if owner != own]
        if others:
            tied[name] = others[0]
    return tied


def check_modules(model: nn.Module, names: Iterable[str], trainable: Iterable[str]) -> None:
    """Raises `UserError` where a name is no trainable linear of the model, or its weight is tied to another's."""
    names, known = list(names), set(trainable)
    modules = dict(model.named_modules())
    for name in names:
        if name in known:  # an expert of a 3-D parameter among them, which is no module
            continue
        if name not in modules:
            raise UserError(f"the model has no module '{name}'.{nearest(name, known)}")
        found = type(modules[name]).__name__
        raise UserError(f"'{name}' is a {found}, not a linear layer of the decoder.{nearest(name, known)}")
    for name, other in tied_names(model, names).items():
        raise UserError(f"the weight of '{name}' is tied to '{other}': training one would change the other.")


def _place(model: nn.Module) -> Callable[[tuple[str, Any]], tuple[int, int]]:
    """Sorts experts of one 3-D parameter as the model has them, behind all others, whose place their names tell."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}

    def key(item: tuple[str, Any]) -> tuple[int, int]:
        parameter, _, number = item[0].rpartition(".")
        return (places[parameter], int(number)) if parameter in places and number.isdecimal() else (-1, 0)

    return key


def convert(model: nn.Module, modules: Mapping[str, Mapping[str, Any]], block_size: int | None = None) -> nn.Module:
    """Freezes the model and replaces linears by sparse layers around the same weights.

    `modules` gives indices by module and kind, in the checkpoint's order. All or nothing: where one module cannot be
    converted, the model is left as it was. Experts come in the model's order, whatever that of `modules`: an
    optimizer's state is taken up by the order of the parameters, and a selection read from its file has its own.
    """
    layers: list[tuple[nn.Module | None, SparseLinear]] = []
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, kinds in sorted(modules.items(), key=_place(model)):
            expert = find_expert(model, name)
            old = None if expert is not None else model.get_submodule(name)
            try:
                if old is None:
                    new: SparseLinear = ExpertLinear(expert)
                else:
                    new = wrapped(model, name, kinds)
                for kind, index in kinds.items():
                    new.add_pattern(kind, index, block_size if kind == "blocks" else None)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            layers.append((old, new))
    except UserError:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
        raise
    model.requires_grad_(False)
    for _, new in layers:
        if isinstance(new, ExpertLinear):
            new.put_in_place()
    replace_modules(model, [(old, new) for old, new in layers if not isinstance(new, ExpertLinear)])
    share_inputs(model)
    return model


def restore(model: nn.Module, *, merged: bool) -> nn.Module:
    """Puts the original modules back, with the base's own weights, or with the deltas in them (`merged`)."""
    separate(model)
    forget_sharing(model)
    layers = sparse_layers(model).values()
    for layer in layers:
        if merged:
            layer.write_back()
        else:
            layer.restore_base()
    replace_modules(model, [(layer, layer.unwrap()) for layer in layers if not isinstance(layer, ExpertLinear)])
    close_experts(model)
    return model


def start_at_checkpoint(model: nn.Module) -> None:
    """What trains starts at the checkpoint's full precision (`method.residual`), also when it becomes active again."""
    for layer in sparse_layers(model).values():
        for pattern in layer.patterns.values():
            pattern.residual = True
        if isinstance(layer, BesideLinear):
            layer.take_residuals()


def put_beside(model: nn.Module) -> None:
    """From now on the weights hold the base alone, in the original order, and the same deltas stand beside them, as
    weights in shards need it. ValueError where a layer's weight holds more than its patterns say (re-selection), or
    is an expert's."""
    layers = {name: layer for name, layer in sparse_layers(model).items() if not layer.beside}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear) or any(p.inactive is not None for p in layer.patterns.values()):
            raise ValueError(f"{name}: inactive entries and experts need a weight that can be written")
    separate(model)
    pairs = []
    for layer in layers.values():
        patterns = layer.install({})
        new = BesideLinear.wrap(layer.unwrap())
        new.install(patterns)
        pairs.append((layer, new))
    replace_modules(model, pairs)
    share_inputs(model)


@contextlib.contextmanager
def original_order(layers: Iterable[SparseLinear]) -> Iterator[None]:
    """Inside, the layers store their weights in the checkpoint's order; afterwards in their own again."""
    own = [(layer, layer.row_permutation, layer.column_permutation) for layer in layers if layer.is_permuted]
    try:
        for layer, _, _ in own:
            layer.permute()
        yield
    finally:
        for layer, rows, columns in own:
            layer.permute(rows, columns)
