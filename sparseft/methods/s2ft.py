"""S2FT: structured sparse fine-tuning (Yang et al., NeurIPS 2024, arXiv 2412.06289).

Selects attention heads and FFN channels and trains them densely: of q, k, v, gate and up the weight's rows (output
features), of o and down its columns (input features).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from sparseft.errors import LayoutWarning, UserError, nearest
from sparseft.methods.base import SparseConfig
from sparseft.rules import Rule

if TYPE_CHECKING:
    from torch import nn

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ROLES = get_args(Role)
RATIO_FIELDS = {
    "q_ratio": "q",
    "k_ratio": "k",
    "v_ratio": "v",
    "o_ratio": "o",
    "g_ratio": "gate",
    "u_ratio": "up",
    "d_ratio": "down",
}
Ratio = Annotated[float, Rule(lambda value: 0.0 <= value <= 1.0, "a share of the units between 0 and 1")]


@dataclass
class S2FTConfig(SparseConfig):
    """A budget by role (`*_ratio`, shares of heads or channels) or by `sparsity`, spent on `roles`.

    An architecture whose roles are not known trains by names: `rows` and `columns` take the place of `roles`.
    """

    name = "s2ft"
    learning_rate = 2e-4

    q_ratio: Ratio | None = None
    k_ratio: Ratio | None = None
    v_ratio: Ratio | None = None
    o_ratio: Ratio | None = None
    g_ratio: Ratio | None = None
    u_ratio: Ratio | None = None
    d_ratio: Ratio | None = None
    roles: list[Role] | None = None
    rows: list[str] | None = None
    columns: list[str] | None = None
    layout: Literal["gather", "permuted"] = "gather"

    @property
    def by_role(self) -> bool:  # type: ignore[override]
        """Not of linears that are named, whose units are single features."""
        return self.rows is None and self.columns is None

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios that were set, by role."""
        values = {role: getattr(self, field) for field, role in RATIO_FIELDS.items()}
        return {role: value for role, value in values.items() if value is not None}

    @property
    def wanted_sparsity(self) -> float | None:
        return None if self.ratios else super().wanted_sparsity

    def validate(self) -> None:
        super().validate()
        if self.ratios and self.sparsity is not None:
            raise UserError(
                f"sparsity={self.sparsity} and ratios ({', '.join(self.ratios)}) both set the budget: give one of them."
            )
        if self.ratios and not any(self.ratios.values()):
            raise UserError("every ratio that is set is 0, so nothing would be trained: set one above 0.")
        if self.roles is not None and not self.roles:
            raise UserError(f"method.roles is empty: name at least one of {', '.join(ROLES)}.")
        if self.ratios and self.roles is not None:
            given = ", ".join(f"method.{field}" for field, role in RATIO_FIELDS.items() if role in self.ratios)
            raise UserError(f"method.roles and {given} both say what trains: give one of them.")
        named = [field for field in ("rows", "columns") if getattr(self, field) is not None]
        for field in named:
            if not getattr(self, field):
                raise UserError(f"method.{field} is empty: name at least one linear, or null for none.")
        if named and (self.ratios or self.roles is not None):
            other = "ratios" if self.ratios else "method.roles"
            raise UserError(f"method.{named[0]} and {other} both say what trains: give one of them.")

    def budget(self, spec: ModelSpec) -> Budget:
        from sparseft.selection.budget import ratio_budget, sparsity_budget

        if self.rows is not None or self.columns is not None:
            slots = spec.feature_slots(self._named_sides(spec))
            roles = list(dict.fromkeys(slot.role for slot in slots))
            return sparsity_budget(replace(spec, slots=slots), roles, self.wanted_sparsity, scope=self.scope)
        present = {slot.role for slot in spec.slots_in(self.scope)}
        if not present:
            raise UserError(
                f"no module in scope has a role that s2ft knows ({', '.join(ROLES)}); found {spec.leaves(self.scope)}: "
                "name those to train in method.rows (output features) or method.columns (input features), or use "
                "method=sylva."
            )
        if self.ratios:
            return ratio_budget(spec, self.ratios, scope=self.scope)
        roles = self.roles
        if roles is None:
            roles = ["down"] if spec.num_kv_heads < spec.num_heads else ["o", "down"]
            # A scope that leaves out the default roles still has something to train: all that it holds.
            roles = [role for role in roles if role in present] or [role for role in ROLES if role in present]
        return sparsity_budget(spec, roles, self.wanted_sparsity, scope=self.scope)

    def _named_sides(self, spec: ModelSpec) -> dict[str, str]:
        """The side that trains of each linear whose name ends in one of `rows` or `columns` (whole parts of a name)."""
        paths = {name: spec.path_of(name) for name in spec.linears_in(self.scope)}
        sides: dict[str, str] = {}
        for side in ("rows", "columns"):
            for suffix in getattr(self, side) or []:
                ending = [n for n, path in paths.items() if f".{path}".endswith(f".{suffix}") or n == suffix]
                if not ending:
                    spec.check_trains(n for n in spec.frozen if n.endswith(f".{suffix}") and (self.scope or "") in n)
                    raise UserError(
                        f"method.{side}: no linear in scope is called '{suffix}'; found {spec.leaves(self.scope)}."
                        f"{nearest(suffix, [path.rpartition('.')[2] for path in paths.values()])}"
                    )
                for name in ending:
                    if sides.setdefault(name, side) != side:
                        raise UserError(f"method.rows and method.columns both name {name}: choose one side.")
        return sides

    def granularity(self, selection: Selection | None) -> str | None:
        return "heads and channels"

    def layout_plan(self, model: nn.Module, selection: Selection, spec: ModelSpec) -> Any:
        if self.layout == "gather":
            return None
        from sparseft.layers.permuted_layout import plan_permutations

        return plan_permutations(model, selection.modules, spec)

    def convert(self, model: nn.Module, selection: Selection | None, spec: ModelSpec | None) -> nn.Module:
        """As every sparse method does; with `layout: permuted`, a `LayoutWarning` says what stays `gather`, and why."""
        if self.layout == "gather":
            return super().convert(model, selection, spec)
        from sparseft.layers import convert_permuted

        stays = convert_permuted(model, selection.modules, spec, selection.block_size)
        for reason, modules in stays.items():
            who = f"{modules[0]} stays" if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more stay"
            message = f"method.layout=permuted: {who} gather: {reason}."
            warnings.warn(message, LayoutWarning, stacklevel=5)  # the caller of attach
        return model
