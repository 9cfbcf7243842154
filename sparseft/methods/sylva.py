"""Sylva: block-sparse fine-tuning of the most important weights (ICS 2024, doi 10.1145/3650200.3656619)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from sparseft.errors import UserError
from sparseft.methods.base import Importance, SparseConfig
from sparseft.rules import ABOVE_0, AT_LEAST_1, Rule
from sparseft.selection import TOLERANCE

if TYPE_CHECKING:
    from typing import Self

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection

BlockSize = Literal[4, 8, 16, 32, 64, 128]
BLOCK_SIZES = get_args(BlockSize)
DEFAULT_SIZES = (64, 32, 16, 8, 4)  # what None tries, in this order
LEVELS = Rule(lambda value: value >= 0, "0 (dense) or more levels")


@dataclass(frozen=True)
class Outcome:
    """The share of the weights in scope that blocks of one size train, and the share asked for.

    Blocks at the edges of a weight may be smaller: `average` is over all choices of blocks, `most` of the largest ones,
    which scores that are sums over a block tend to choose.
    """

    asked: float
    average: float
    most: float

    @property
    def missed(self) -> float:
        """How far what trains may be off, as a share of what was asked for."""
        furthest = max(abs(share / self.asked - 1.0) for share in (self.average, self.most))
        return round(furthest, 9)  # a tenth is a tenth

    def __str__(self) -> str:
        low, high = f"{self.average:.2%}", f"{self.most:.2%}"
        return low if low == high else f"{low} to {high}"


@dataclass
class SylvaConfig(SparseConfig):
    """Blocks of `block_size` × `block_size` weights, the top share (1 − sparsity) of them by importance."""

    name = "sylva"
    learning_rate = 2e-4
    once_default = {"block_size": 64, "rank": 1}

    importance: Importance = "sylva"
    block_size: BlockSize | None = None  # None: what `settled` finds
    num_partition: Annotated[int, LEVELS] = 8
    rank: Annotated[int, AT_LEAST_1] | None = None  # None: the structure's own
    damping: Annotated[float, ABOVE_0] = 1e-3

    def settled(self, spec: ModelSpec) -> Self:
        """With a block size: 64, or the largest smaller one whose blocks meet the sparsity (`Outcome.missed`).

        Where none does, as on tiny models at a high sparsity, it is the one that comes nearest. A given size is kept,
        whatever it trains, and refused only where it is larger than both sides of a weight.
        """
        linears = spec.linears_in(self.scope)
        limit, smallest = min((max(shape), name) for name, shape in linears.items())
        outcomes: dict[int, Outcome] = {}
        for size in (size for size in DEFAULT_SIZES if size <= limit):
            outcomes[size] = self._outcome(spec, size)
            if outcomes[size].missed <= TOLERANCE:
                break
        if not outcomes:
            raise UserError(f"{smallest}: both sides are below 4, the smallest block; leave it out by scope.")
        best = min(outcomes, key=lambda size: outcomes[size].missed)
        given = self.block_size
        if given is None:
            return replace(self, block_size=best)
        nearest = "" if outcomes[best].missed <= TOLERANCE else "comes nearest and "
        for name, (rows, columns) in linears.items():
            if max(rows, columns) < given:
                raise UserError(
                    f"method.block_size={given} is larger than both sides of {name} ({rows}×{columns}): use at most "
                    f"{max(size for size in BLOCK_SIZES if size <= limit)}; for sparsity {self.wanted_sparsity} "
                    f"{best}, which {nearest}trains {outcomes[best]} of the weights in scope."
                )
        return self

    def _outcome(self, spec: ModelSpec, size: int) -> Outcome:
        from sparseft.selection.budget import block_budget, blocks_spent

        budget = block_budget(spec, size, self.wanted_sparsity, scope=self.scope)
        average, most = blocks_spent(budget, self.allocation)
        return Outcome(1.0 - self.wanted_sparsity, average / budget.scope_parameters, most / budget.scope_parameters)

    def budget(self, spec: ModelSpec) -> Budget:
        from sparseft.selection.budget import block_budget

        size = self.block_size if self.block_size is not None else self.settled(spec).block_size
        return block_budget(spec, size, self.wanted_sparsity, scope=self.scope)

    def statistics(self) -> dict[str, Any]:
        own = {"num_partition": self.num_partition, "rank": self.rank, "damping": self.damping}
        return super().statistics() | own

    def with_block_size(self, size: int | None) -> Self:
        return replace(self, block_size=size)

    def granularity(self, selection: Selection | None) -> str | None:
        return None if selection is None else f"blocks of {selection.block_size}"
