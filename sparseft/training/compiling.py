"""Steps of compiled decoder layers, and of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparseft.models.decoder import decoder_layers

GRAPHS = "reduce-overhead"  # torch.compile's mode that records CUDA graphs
BACKEND = "inductor"  # of torch.compile
VARIANTS = 4  # of a layer's code: in training and evaluation, with other lengths, on an input that asks for no gradient


class CompiledLayers:
    """A model's decoder layers, each compiled by itself, where they are asked to be.

    Layers with the same modules, shapes and kinds of indices share their code, so that a deep model compiles as fast as
    a shallow one. Only what stands inside `running()` is compiled: evaluations, generation and calibration, with their
    own shapes, run the layers as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(decoder_layers(model)[1])
        self.calls = []
        for layer in self.layers:
            layer.compile(backend=BACKEND)
            self.calls.append(layer._compiled_call_impl)
        self._use([None] * len(self.layers))
        # All layers are one function to the compiler, which gives up on a function of many variants.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * len(self.layers))
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 2 * dynamo.recompile_limit)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the compiled layers are the model's: forward passes with their backward passes."""
        self._use(self.calls)
        try:
            yield
        finally:
            self._use([None] * len(self.layers))

    def _use(self, calls: list[Any]) -> None:
        for layer, call in zip(self.layers, calls, strict=True):
            vars(layer)["_compiled_call_impl"] = call  # past `nn.Module.__setattr__`, which looks for parameters


def own_gradients(model: nn.Module) -> None:
    """Moves gradients out of a CUDA graph's memory, where its next replay would write over them."""
    held = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in held:
        parameter.grad = parameter.grad.clone()
