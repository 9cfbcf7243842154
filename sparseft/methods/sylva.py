"""Sylva: block-sparse fine-tuning of the most important weights (ICS 2024, doi 10.1145/3650200.3656619)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseft.errors import UserError
from sparseft.methods.base import TOLERANCE, SparseConfig, SparseMethod, check_choice

if TYPE_CHECKING:
    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
DEFAULT_SIZES = (64, 32, 16, 8, 4)  # what null tries, in this order


@dataclass
class SylvaConfig(SparseConfig):
    """Blocks of `block_size` × `block_size` weights, the top share (1 − sparsity) of them by importance."""

    importance: str = "sylva"
    block_size: int | None = None  # 4 | 8 | 16 | 32 | 64 | 128; null: 64, or what `Sylva.settled` finds
    num_partition: int = 8  # levels of halving of the second-order statistics; 0: dense
    rank: int = 1  # of their off-diagonal blocks
    damping: float = 1e-3  # relative to the mean diagonal

    def validate(self) -> None:
        super().validate()
        if self.block_size is not None:
            check_choice("method.block_size", self.block_size, BLOCK_SIZES)
        if self.num_partition < 0:
            raise UserError(f"method.num_partition={self.num_partition}: expected 0 (dense) or more levels.")
        if self.rank < 1:
            raise UserError(f"method.rank={self.rank}: expected at least 1.")
        if not self.damping > 0:
            raise UserError(f"method.damping={self.damping}: expected more than 0.")


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
        return max(self.off(self.average), self.off(self.most))

    def off(self, share: float) -> float:
        """How far a share is off, as a share of what was asked for (rounded: a tenth is a tenth)."""
        return round(abs(share / self.asked - 1.0), 9)

    def __str__(self) -> str:
        low, high = f"{self.average:.2%}", f"{self.most:.2%}"
        return low if low == high else f"{low} to {high}"


class Sylva(SparseMethod):
    name = "sylva"
    config_class = SylvaConfig
    learning_rate = 2e-4

    def settled(self, spec: ModelSpec, config: SylvaConfig) -> SylvaConfig:
        """With a block size: 64, or the largest smaller one whose blocks meet the sparsity (`Outcome.missed`).

        Where none does, as on tiny models at a high sparsity, it is the one that comes nearest. A given size is refused
        where it is larger than both sides of a weight, and where what it tends to choose misses a sparsity that was
        given too, while another meets it or comes nearer.
        """
        linears = spec.linears_in(config.scope)
        limit, smallest = min((max(shape), name) for name, shape in linears.items())
        outcomes: dict[int, Outcome] = {}
        for size in (size for size in DEFAULT_SIZES if size <= limit):
            outcomes[size] = self._outcome(spec, config, size)
            if outcomes[size].missed <= TOLERANCE:
                break
        if not outcomes:
            raise UserError(f"{smallest}: both sides are below 4, the smallest block; leave it out by scope.")
        best = min(outcomes, key=lambda size: outcomes[size].missed)
        given = config.block_size
        if given is None:
            return replace(config, block_size=best)
        nearest = "" if outcomes[best].missed <= TOLERANCE else "comes nearest and "
        for name, (rows, columns) in linears.items():
            if max(rows, columns) < given:
                raise UserError(
                    f"method.block_size={given} is larger than both sides of {name} ({rows}×{columns}): use at most "
                    f"{max(size for size in BLOCK_SIZES if size <= limit)}; for sparsity {config.wanted_sparsity} "
                    f"{best}, which {nearest}trains {outcomes[best]} of the weights in scope."
                )
        found = self._outcome(spec, config, given)
        largest = config.importance != "random" and config.order == "largest"  # else any block alike
        missed = found.off(found.most if largest else found.average)
        if config.sparsity is not None and missed > max(TOLERANCE, outcomes[best].missed):
            raise UserError(
                f"method.block_size={given} trains {found} of the weights in scope, and sparsity={config.sparsity} "
                f"asks for {found.asked:.2%}: use method.block_size={best}, which {nearest}trains {outcomes[best]}."
            )
        return config

    def _outcome(self, spec: ModelSpec, config: SylvaConfig, size: int) -> Outcome:
        from sparseft.selection.budget import block_budget, blocks_spent

        budget = block_budget(spec, size, config.wanted_sparsity, scope=config.scope)
        average, most = blocks_spent(budget, config.allocation)
        return Outcome(1.0 - config.wanted_sparsity, average / budget.scope_parameters, most / budget.scope_parameters)

    def budget(self, spec: ModelSpec, config: SylvaConfig) -> Budget:
        from sparseft.selection.budget import block_budget

        if config.block_size is None:
            config = self.settled(spec, config)
        return block_budget(spec, config.block_size, config.wanted_sparsity, scope=config.scope)
