"""What tests of second moments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparseft.importance import multilevel


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_leaves() -> Iterator[None]:
    """So that small matrices have several levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multilevel, "LEAST_LEAF_ROWS", 8)
        yield
