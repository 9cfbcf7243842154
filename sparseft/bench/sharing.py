"""One model's frozen weights under all contenders that train something beside them.

A benchmark of five methods on a 7B would else hold its weights five times. Methods that write base + delta into the
weights take turns with them: what one has written is put back, bit for bit, before another steps.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparseft.layers import sparse_layers
from sparseft.layers.permutation import inverse, permuted
from sparseft.layers.sparse_linear import SparseLinear


class SharedWeights:
    """A plain model and the copies that share its parameters' and buffers' storages; at most one of them `holds` them.

    Between turns, and after `give(None)`, they are the plain model's, bit for bit.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.holder: nn.Module | None = None
        self._written: list[SparseLinear] = []  # the layers whose deltas, and order, are in the weights

    def copy(self, *, own: bool = False) -> nn.Module:
        """A copy of the plain model with its storages, or with storages of its own.

        Parameters are new ones, so that each copy freezes and tracks its own. What is no plain tensor is copied.
        """
        self.give(None)
        shared: dict[int, Tensor] = {}
        if not own:
            for parameter in self.base.parameters():
                if type(parameter) is nn.Parameter:
                    shared[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
            shared |= {id(buffer): buffer.data for buffer in self.base.buffers() if type(buffer) is Tensor}
        return copy.deepcopy(self.base, dict(shared))

    def claim(self, model: nn.Module) -> None:
        """Says that the copy `model` is going to write into the weights: attaching may store them in another order."""
        self.give(None)
        self.holder = model

    def give(self, model: nn.Module | None) -> None:
        """Lets the copy `model` step: its deltas are in the weights, nobody else's are. None: the plain model's.

        Where that fails midway (memory may run out), nobody holds the weights, and the next call puts back what is
        written until then.
        """
        if model is not None and model is self.holder:
            return
        if self.holder is not None:
            self._written = list(sparse_layers(self.holder).values())
        self.holder = None
        while self._written:
            layer = self._written[-1]
            layer.restore_base()
            _reorder(layer, inverse(layer.row_permutation), inverse(layer.column_permutation))
            self._written.pop()
        if model is not None:
            for layer in sparse_layers(model).values():
                _reorder(layer, layer.row_permutation, layer.column_permutation)
                self._written.append(layer)
                layer.write_back()
        self.holder = model


@torch.no_grad()
def _reorder(layer: SparseLinear, rows: Tensor | None, columns: Tensor | None) -> None:
    """Stores the layer's weight and bias with rows and columns picked so, behind its back: what the layer and its
    optimizer know of where things lie is for its turn, and stays."""
    if rows is None and columns is None:
        return
    tensors = [tensor.data for tensor in (layer.weight, layer.bias) if tensor is not None]
    # All or nothing: memory may run out.
    moved = [permuted(tensor, rows, columns, transposed=layer.transposed) for tensor in tensors]
    for tensor, values in zip(tensors, moved, strict=True):
        tensor.copy_(values)
