"""Files written tensor by tensor are what safetensors itself reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sparseft.export.safetensors_stream import DTYPES, write_stream


def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {f"a.{dtype}": (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "ü": torch.randn(2, 3, 4),
        "t": torch.randn(4, 3).t(),
    }
    header = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_stream(tmp_path / "x", header, iter(tensors.items()), {"format": "pt"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    """The second is asked for when the first is in the file."""
    sizes = []

    def tensors():
        for name in "ab":
            sizes.append((tmp_path / "x").stat().st_size)
            yield name, torch.zeros(2**16)

    write_stream(tmp_path / "x", dict.fromkeys("ab", (torch.float32, (2**16,))), tensors())
    assert sizes[1] - sizes[0] >= 2**17


@pytest.mark.parametrize(
    "tensors", [[("b", torch.zeros(2))], [("a", torch.zeros(3))], [], [("a", torch.zeros(2).half())]]
)
def test_what_the_header_does_not_say_is_a_fault(tmp_path: Path, tensors: list) -> None:
    with pytest.raises(AssertionError):
        write_stream(tmp_path / "x", {"a": (torch.float32, (2,))}, tensors)
