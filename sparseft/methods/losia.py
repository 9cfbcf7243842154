"""LoSiA: low-resources subnet integration adaptation (Wang, Qi and Xu, EMNLP 2025, arXiv 2507.04487).

Of every linear a subnet trains: the entries where some output features cross some input features. Layer by layer, each
in its turn, subnets are chosen anew by the sensitivity of all of the layer's weights, which the steps before its turn
have shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sparseft.errors import UserError
from sparseft.methods.base import EVERY, SparseConfig

if TYPE_CHECKING:
    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection


@dataclass
class LosiaConfig(SparseConfig):
    """Of every linear √(1 − sparsity) of the rows and columns. `reselect_steps` are those of one layer's turn
    (by calibration: those between two choices of all layers)."""

    name = "losia"
    learning_rate = 2e-4
    reselects_in_turn = True
    unnamed = {}  # always did so

    reselect_steps: Annotated[int, EVERY] = 100

    def validate(self) -> None:
        super().validate()
        if self.allocation != "per_layer":
            raise UserError(
                f"method.allocation={self.allocation}: losia gives every linear the same share of its rows and "
                "columns; use method.allocation=per_layer."
            )
        if self.exclude:
            raise UserError(
                "method.exclude: a grid cannot go round what other adapters train; use method=s2ft, sylva or paca."
            )

    def budget(self, spec: ModelSpec) -> Budget:
        from sparseft.importance.units import Candidate
        from sparseft.selection.budget import Budget, keep_count

        share = spec.share_of(self.wanted_sparsity, self.scope)
        candidates, grids = [], {}
        for name, (rows, columns) in spec.linears_in(self.scope).items():
            candidates.append(Candidate(name, "grid", (rows, columns), 0, 1, rows * columns))
            # A grid's rank is that of its shorter side. What this side leaves, or overdraws, is made up by the other.
            height = keep_count(math.sqrt(share), rows)
            width = keep_count(share * rows / height, columns)
            if self.max_rank is not None and min(height, width) > self.max_rank:
                if height <= width:
                    height, width = self.max_rank, keep_count(share * rows / self.max_rank, columns)
                else:
                    height, width = keep_count(share * columns / self.max_rank, rows), self.max_rank
            grids[name] = height, width
        kept = {name: height * width for name, (height, width) in grids.items()}
        return Budget(candidates, kept, {"": sum(kept.values())}, 1, spec.weights_in(self.scope), grids=grids)

    def granularity(self, selection: Selection | None) -> str | None:
        return "grids of rows and columns"
