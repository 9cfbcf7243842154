"""S2FT: structured sparse fine-tuning (Yang et al., NeurIPS 2024, arXiv 2412.06289).

Selects attention heads and FFN channels and trains them densely: of q, k, v, gate and up the weight's rows (output
features), of o and down its columns (input features).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseft.errors import LayoutWarning, UserError
from sparseft.methods.base import DEFAULT_SPARSITY, SparseConfig, SparseMethod, check_choice

if TYPE_CHECKING:
    from torch import nn

    from sparseft.modeling import ModelSpec
    from sparseft.selection import Budget, Selection

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
RATIO_FIELDS = {
    "q_ratio": "q",
    "k_ratio": "k",
    "v_ratio": "v",
    "o_ratio": "o",
    "g_ratio": "gate",
    "u_ratio": "up",
    "d_ratio": "down",
}


@dataclass
class S2FTConfig(SparseConfig):
    """A budget by role (`*_ratio`, shares of heads or channels) or by `sparsity`, spent on `roles`."""

    q_ratio: float | None = None
    k_ratio: float | None = None
    v_ratio: float | None = None
    o_ratio: float | None = None
    g_ratio: float | None = None
    u_ratio: float | None = None
    d_ratio: float | None = None
    roles: list[str] | None = None  # what sparsity is spent on; null: o and down, with grouped queries down
    layout: str = "gather"  # gather | permuted

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios that were set, by role."""
        values = {role: getattr(self, field) for field, role in RATIO_FIELDS.items()}
        return {role: value for role, value in values.items() if value is not None}

    def validate(self) -> None:
        super().validate()
        for field in RATIO_FIELDS:
            value = getattr(self, field)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UserError(f"method.{field}={value}: expected a share of the units between 0 and 1.")
        if self.ratios and self.sparsity is not None:
            raise UserError(
                f"sparsity={self.sparsity} and ratios ({', '.join(self.ratios)}) both set the budget: give one of them."
            )
        if self.ratios and not any(self.ratios.values()):
            raise UserError("every ratio that is set is 0, so nothing would be trained: set one above 0.")
        for role in self.roles or []:
            check_choice("method.roles", role, ROLES)
        if self.roles is not None and not self.roles:
            raise UserError(f"method.roles is empty: name at least one of {', '.join(ROLES)}.")
        check_choice("method.layout", self.layout, ("gather", "permuted"))


class S2FT(SparseMethod):
    name = "s2ft"
    config_class = S2FTConfig
    learning_rate = 2e-4

    def budget(self, spec: ModelSpec, config: S2FTConfig) -> Budget:
        from sparseft.selection import ratio_budget, sparsity_budget

        if config.ratios:
            return ratio_budget(spec, config.ratios, scope=config.scope)
        roles = config.roles
        if roles is None:
            roles = ["down"] if spec.num_kv_heads < spec.num_heads else ["o", "down"]
            # A scope that leaves out the default roles still has something to train: all that it holds.
            present = {slot.role for slot in spec.slots_in(config.scope)}
            roles = [role for role in roles if role in present] or [role for role in ROLES if role in present]
        return sparsity_budget(spec, roles, config.sparsity or DEFAULT_SPARSITY, scope=config.scope)

    def convert(self, model: nn.Module, config: S2FTConfig, selection: Selection | None) -> nn.Module:
        """As every sparse method does; with `layout: permuted`, a `LayoutWarning` says what stays `gather`, and why."""
        if config.layout == "gather" or selection is None:
            return super().convert(model, config, selection)
        from sparseft.layers import convert_permuted
        from sparseft.modeling import ModelSpec

        for reason, modules in convert_permuted(model, selection, ModelSpec.of(model)).items():
            who = f"{modules[0]} stays" if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more stay"
            message = f"method.layout=permuted: {who} gather: {reason}."
            warnings.warn(message, LayoutWarning, stacklevel=3)  # the caller of attach
        return model
