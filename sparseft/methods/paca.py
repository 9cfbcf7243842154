"""PaCA: partial connection adaptation (Woo et al., ICLR 2025, arXiv 2503.01905).

Trains the connections of a few input features of every linear: whole columns of its weight, by default drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sparseft.errors import UserError
from sparseft.methods.base import RANK, SparseConfig

if TYPE_CHECKING:
    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection


@dataclass
class PacaConfig(SparseConfig):
    """`rank` input features of every linear, or of each the share (1 − sparsity)."""

    name = "paca"
    learning_rate = 2e-4

    rank: Annotated[int, RANK] | None = None

    @property
    def wanted_sparsity(self) -> float | None:
        return None if self.rank is not None else super().wanted_sparsity

    def validate(self) -> None:
        super().validate()
        if self.rank is not None and self.sparsity is not None:
            raise UserError(f"sparsity={self.sparsity} and method.rank={self.rank} both set the size: give one.")

    def budget(self, spec: ModelSpec) -> Budget:
        from sparseft.importance.units import Candidate
        from sparseft.selection.budget import Budget, keep_count

        linears = spec.linears_in(self.scope)
        narrowest, (_, least) = min(linears.items(), key=lambda linear: linear[1][1])
        if self.rank is not None and self.rank > least:
            raise UserError(
                f"method.rank={self.rank}: {narrowest} has only {least} input features; use at most {least}."
            )
        # A column costs as many weights as the linear has output features: those of one name compete with each other.
        candidates = [
            Candidate(name, "columns", shape, 0, 1, shape[1], spec.path_of(name).rpartition(".")[2])
            for name, shape in linears.items()
        ]
        share = 0.0 if self.wanted_sparsity is None else spec.share_of(self.wanted_sparsity, self.scope)
        kept = {c.key: self.rank or keep_count(share, c.count) for c in candidates}
        pooled: dict[str, int] = {}
        for c in candidates:
            pooled[c.role] = pooled.get(c.role, 0) + kept[c.key]
        return Budget(candidates, kept, pooled, 1, spec.weights_in(self.scope))

    def granularity(self, selection: Selection | None) -> str | None:
        return "whole input features"
