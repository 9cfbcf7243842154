"""What `torch.compile` made of a model: work on the model inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

STATE = "_sparseft"  # the attribute of an attached model that holds `adapter.State`


def inside_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `function(model, …)` take what `torch.compile` made of a model: it works on the model inside, by whose
    names adapters are kept. A model that stays attached is returned as it was given, compiled."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **options: Any) -> Any:
        inner = getattr(model, "_orig_mod", model)
        result = function(inner, *args, **options)
        return model if result is inner and hasattr(inner, STATE) else result

    return call
