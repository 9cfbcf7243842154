"""Second moments as dense matrices in NumPy, and what a streamed one is held to."""

from __future__ import annotations

import math

import numpy as np
import torch

from sparseft.importance.hodlr import Hodlr
from sparseft.importance.second_moment import SecondMoment


def data(n: int, tokens: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """(tokens, n) float32 vectors whose second moment has eigenvalues that fall as i^-decay in a random basis."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    scale = np.arange(1, n + 1) ** (-decay / 2)
    return torch.from_numpy((rng.standard_normal((tokens, n)) * scale @ basis.T).astype(np.float32))


def moment(x: torch.Tensor) -> np.ndarray:
    x = x.reshape(-1, x.shape[-1]).double().numpy()
    return x.T @ x / max(1, len(x))


def relative(found: np.ndarray | torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / max(np.linalg.norm(expected), 1e-300))


def check_inverse(matrix: SecondMoment, damping: float, tolerance: float = 1e-6) -> None:
    """The inverse's diagonal is the dense one's, with the damping asked for, or, of `Hodlr`, the first that serves."""
    found = matrix.inverse_diagonal(damping).numpy()
    used = matrix.effective_damping
    dense = matrix.to_dense().numpy()
    unit = np.diag(dense).mean() or 1.0
    eye = np.eye(matrix.n)
    assert found.shape == (matrix.n,) and np.isfinite(found).all() and (found > 0).all()
    if isinstance(matrix, Hodlr):
        assert np.linalg.eigvalsh(dense + used * unit * eye)[0] > 0
    else:
        assert used == damping
    if used > damping:
        assert round(math.log10(used / damping), 9) % 1 == 0
        assert np.linalg.eigvalsh(dense + used / 10 * unit * eye)[0] < 1e-9 * unit  # no less would have done
    np.testing.assert_allclose(found, np.diag(np.linalg.inv(dense + used * unit * eye)), rtol=tolerance)
