"""Sylva: block-sparse fine-tuning of the most important weights (ICS 2024, doi 10.1145/3650200.3656619)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseft.errors import UserError
from sparseft.methods.base import SparseConfig, SparseMethod, check_choice

if TYPE_CHECKING:
    from sparseft.modeling import ModelSpec
    from sparseft.selection import Budget

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


@dataclass
class SylvaConfig(SparseConfig):
    """Blocks of `block_size` × `block_size` weights, the top share (1 − sparsity) of them by importance."""

    importance: str = "sylva"
    block_size: int = 64  # 4 | 8 | 16 | 32 | 64 | 128
    num_partition: int = 8  # levels of halving of the second-order statistics; 0: dense
    rank: int = 1  # of their off-diagonal blocks
    damping: float = 1e-3  # relative to the mean diagonal

    def validate(self) -> None:
        super().validate()
        check_choice("method.block_size", self.block_size, BLOCK_SIZES)
        if self.num_partition < 0:
            raise UserError(f"method.num_partition={self.num_partition}: expected 0 (dense) or more levels.")
        if self.rank < 1:
            raise UserError(f"method.rank={self.rank}: expected at least 1.")
        if not self.damping > 0:
            raise UserError(f"method.damping={self.damping}: expected more than 0.")


class Sylva(SparseMethod):
    name = "sylva"
    config_class = SylvaConfig
    learning_rate = 2e-4

    def budget(self, spec: ModelSpec, config: SylvaConfig) -> Budget:
        from sparseft.selection import block_budget

        return block_budget(spec, config.block_size, config.wanted_sparsity, scope=config.scope)
