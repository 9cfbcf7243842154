"""What every method offers, and what the two sparse ones share. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparseft.errors import UserError, nearest

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection

IMPORTANCES = ("random", "weight", "activation", "product", "gradient", "fisher", "sylva")
IMPORTANCES_WITHOUT_DATA = ("random", "weight")
ORDERS = ("largest", "smallest", "sampled")
ALLOCATIONS = ("per_layer", "global")
DEFAULT_SPARSITY = 0.984


def check_choice(field: str, value: object, choices: tuple[Any, ...]) -> None:
    """Refuses a value outside `choices`, naming the nearest."""
    if value not in choices:
        raise UserError(f"{field}={value}: expected one of {', '.join(map(str, choices))}.{nearest(value, choices)}")


def check_share(field: str, value: float | None) -> None:
    """Refuses a share outside (0, 1); null passes."""
    if value is not None and not 0.0 < value < 1.0:
        raise UserError(f"{field}={value}: expected a share between 0 and 1, both excluded (0.984 freezes 98.4 %).")


@dataclass
class SparseConfig:
    """What all sparse methods choose by."""

    name: ClassVar[str]  # the method's

    sparsity: float | None = None  # share of the linear weights in scope that stays frozen
    scope: str | None = None  # substring of module names; null: every linear of the decoder layers
    importance: str = "random"  # random | weight | activation | product | gradient | fisher | sylva
    order: str = "largest"  # largest | smallest | sampled (in proportion to the score)
    allocation: str = "per_layer"  # per_layer | global
    num_samples: int | float | None = 128  # calibration examples; below 1: a share of the data; null: 1 % of it
    reselect_steps: int = 0  # optimizer steps between selections; 0: never
    seed: int = 0

    def validate(self) -> None:
        """Raises `UserError` on a value outside its range, naming the field."""
        check_share("sparsity", self.sparsity)
        check_choice("method.importance", self.importance, IMPORTANCES)
        check_choice("method.order", self.order, ORDERS)
        check_choice("method.allocation", self.allocation, ALLOCATIONS)
        count = self.num_samples
        if count is not None and not (isinstance(count, int) and count >= 1) and not 0.0 < count < 1.0:
            raise UserError(
                f"method.num_samples={count}: expected a whole number of calibration examples, at least 1, or a share "
                "of the training data below 1 (0.01; null is that too)."
            )
        if self.reselect_steps < 0:
            raise UserError(f"method.reselect_steps={self.reselect_steps}: expected 0 (never) or a number of steps.")

    @property
    def wanted_sparsity(self) -> float | None:
        """The sparsity that sets the budget: as given or the default; null where something else sets it."""
        return self.sparsity if self.sparsity is not None else DEFAULT_SPARSITY

    @property
    def needs_data(self) -> bool:
        """Whether choosing needs calibration batches."""
        return self.importance not in IMPORTANCES_WITHOUT_DATA

    def settled(self, spec: ModelSpec) -> Self:
        """The settings with what they leave to the model filled in; refuses what the model cannot meet."""
        return self

    def budget(self, spec: ModelSpec) -> Budget:
        """What may be chosen and how much of it."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """Settings of importance sylva's statistics (`importance.kfac.FactorSettings`) that are not its defaults."""
        return {}

    def with_block_size(self, size: int | None) -> Self:
        """The settings for blocks of that size, where the method trains blocks."""
        return self


class Method:
    """One way of fine-tuning: its config, what it trains, and how it converts a model."""

    name: ClassVar[str]
    config_class: ClassVar[type]
    kind: ClassVar[str]  # sparse: deltas of SparseLinear layers | peft: a wrapper of peft's | whole: every weight
    learning_rate: ClassVar[float]  # used where trainer.learning_rate is null

    @property
    def sparse(self) -> bool:
        """Whether the method trains deltas on a selection."""
        return self.kind == "sparse"

    def accepts(self, config: Any) -> bool:
        """Whether a config of `config_class` means this method."""
        return True

    def convert(self, model: nn.Module, config: Any, selection: Selection | None) -> nn.Module:
        """Makes `model` trainable by this method, in place where it can, and returns it."""
        raise TypeError(f"{self.name} does not convert models")


class SparseMethod(Method):
    """Methods that train deltas on a chosen pattern: they differ in the budget only."""

    kind = "sparse"

    def convert(self, model: nn.Module, config: Any, selection: Selection | None) -> nn.Module:
        from sparseft.layers import convert

        return convert(model, selection.modules, selection.block_size)
