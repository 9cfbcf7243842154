"""Every value of an export is checked, and the dtype and the shape of every tensor that was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseft.compose.run_config import compose
from sparseft.errors import RunError
from sparseft.export.changed_tensors import ChangedTensors
from sparseft.export.source import Source
from sparseft.export.values import check_values
from sparseft.models.checkpoint import Checkpoint
from support import adapted

FIRST, SECOND = (f"model.layers.0.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w3"))
ALONE = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=["fused", "lora"])
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, dict[str, Tensor]]:
    """What is exported, and the tensors as they are to be written: experts lie there one by one."""
    root = tmp_path_factory.mktemp(request.param)
    base = adapted.base("mixtral", root / "base", torch.bfloat16)
    adapter = adapted.adapter("mixtral", request.param, base, root / "adapter")
    source = Source.find(str(adapter), compose("export", [f"model.path={base}"]))
    checkpoint = Checkpoint.of_folder(base)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for change in ChangedTensors(source)():
        tensors[change.name].view(-1)[change.index] = change.values
    check_values(source, tensors.__getitem__)
    return source, tensors


@pytest.mark.parametrize("name", [FIRST, SECOND, ALONE])
def test_a_tensor_of_another_dtype(name: str, written: tuple[Source, dict[str, Tensor]]) -> None:
    """Though its values are the right ones."""
    source, tensors = written
    wrong = tensors | {name: tensors[name].float()}
    with pytest.raises(RunError, match=rf"{name} is torch\.float32 there, expected torch\.bfloat16\. Nothing was kept"):
        check_values(source, wrong.__getitem__)
    wide = {other: tensor.float() for other, tensor in tensors.items()}
    with pytest.raises(RunError, match=r"is torch\.float32 there, expected torch\.bfloat16"):
        check_values(source, wide.__getitem__)


@pytest.mark.parametrize("name", [FIRST, SECOND, ALONE])
def test_a_tensor_of_another_shape(name: str, written: tuple[Source, dict[str, Tensor]]) -> None:
    """With the right values in their order, or with one row more or less."""
    source, tensors = written
    right = tensors[name]
    for wrong in (right.view(2, -1), torch.cat([right, right[:1]]), right[:-1]):
        expected = rf"{name} is \({wrong.shape[0]}, {wrong.shape[1]}\) there, expected \({len(right)}, "
        with pytest.raises(RunError, match=expected):
            check_values(source, (tensors | {name: wrong}).__getitem__)


@pytest.mark.parametrize("name", [FIRST, SECOND, ALONE])
def test_a_value_that_differs_in_a_bit(name: str, written: tuple[Source, dict[str, Tensor]]) -> None:
    source, tensors = written
    wrong = tensors[name].clone()
    wrong.view(torch.int16)[-1, -1] ^= 1
    with pytest.raises(RunError, match="1 of the .* are not base \\+ delta"):
        check_values(source, (tensors | {name: wrong}).__getitem__)
