"""A method is the class of its settings: what each offers, and what the sparse ones share. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from sparseft.config import SPARSITY
from sparseft.errors import UserError
from sparseft.models.chosen_layers import ALL, LAYERS
from sparseft.rules import AT_LEAST_1, Rule, check_fields

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import nn

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.budget import Budget
    from sparseft.selection.selection import Selection

Importance = Literal["random", "weight", "activation", "product", "gradient", "fisher", "sylva"]
IMPORTANCES = get_args(Importance)
IMPORTANCES_WITHOUT_DATA = ("random", "weight")
ReselectBy = Literal["running", "calibration"]
Structure = Literal["multilevel", "hodlr", "dense"]
DEFAULT_SPARSITY = 0.984

SHARED = ("sparsity", "scope", "seed")  # settings that also stand at the top level of a run

SAMPLES = Rule(
    lambda count: (isinstance(count, int) and count >= 1) or 0.0 < count < 1.0,
    "a whole number of calibration examples, at least 1, or a share of the training data below 1 such as 0.01",
)
RANK = Rule(lambda rank: rank >= 1, "at least 1, or null to take it from sparsity")
FOLDER = Rule(lambda path: bool(path.strip()), "a run's or an adapter's folder")
Layers = Annotated[list[int] | str | int | float, LAYERS]  # no number is one: the rule says what is
EVERY = Rule(lambda steps: steps >= 0, "0 (never) or a number of steps")


def called(field: str) -> str:
    """What a user calls a method's setting."""
    return field if field in SHARED else f"method.{field}"


@dataclass
class MethodConfig:
    """One way of fine-tuning: its settings (the fields; `conf/method/` says what each means) and how it trains a model.

    Below are the answers of a method that has nothing special to say; shared code asks for nothing else.
    """

    name: ClassVar[str]
    kind: ClassVar[str]  # of its adapters: sparse | peft | full
    learning_rate: ClassVar[float]  # used where trainer.learning_rate is null
    sparse: ClassVar[bool] = False  # whether it trains deltas on a selection (`SparseConfig`)
    trains_all: ClassVar[bool] = False  # whether it trains every weight
    products: ClassVar[int] = 1  # in which a trained weight takes part in a step, beyond the frozen model's
    unnamed: ClassVar[dict[str, Any]] = {}  # settings of runs that choose anew from before they had a name
    once_default: ClassVar[dict[str, Any]] = {}  # what settings that are null today were in runs of earlier versions

    # Settings that not every method has, as those without them behave.
    scope = None
    layers = ALL
    wanted_sparsity = None  # the sparsity that sets the size: as given or the default; None where something else does
    block_size = None
    dropout = 0.0
    reselect_steps = 0
    reselect_by = "running"
    reselects_in_turn: ClassVar[bool] = False  # by running gradients: one decoder layer every `reselect_steps`, not all

    separable = True  # whether what it trains is a sum of parts that can be scaled one by one

    @property
    def reselects_running(self) -> bool:
        """Whether it chooses anew by the gradients of the steps themselves."""
        return bool(self.reselect_steps) and self.reselect_by == "running"

    def validate(self) -> None:
        """Raises `UserError` on a value outside its range, naming the field."""
        check_fields(self, called, typed=True)

    def settled(self, spec: ModelSpec) -> Self:
        """The settings with what they leave to the model filled in; refuses what the model cannot meet."""
        return self

    def convert(self, model: nn.Module, selection: Selection | None, spec: ModelSpec | None) -> nn.Module:
        """Makes `model` trainable, in place where it can, and returns it.

        selection, spec: None for methods without a selection; of those, LoRA's kind gets a spec.
        """
        raise NotImplementedError

    def frozen_experts(self, spec: ModelSpec) -> list[str]:
        """The 3-D parameters of experts that stay as they are."""
        return spec.frozen_experts(self.sparse)

    def granularity(self, selection: Selection | None) -> str | None:
        """In what units it trains, so that a sparsity may be met only nearly: "blocks of 64"; None: the whole model."""
        return None

    def lora_rank(self, spec: ModelSpec) -> int | None:
        """The rank of the LoRA that it trains; None of a method that trains something else."""
        return None

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether training keeps wider weights than a model of `dtype` has."""
        return False

    def for_benchmark(self) -> Self:
        """The settings for measuring steps: the same work, without dropout and without data."""
        return self


@dataclass
class SparseConfig(MethodConfig):
    """Methods that train deltas on a chosen pattern: what they choose by. They differ in the budget only."""

    kind = "sparse"
    sparse = True
    unnamed = {"reselect_by": "calibration"}
    by_role: ClassVar[bool] = False  # whether its units are those of the roles of `ModelSpec`: heads and channels

    sparsity: Annotated[float, SPARSITY] | None = None
    scope: str | None = None
    layers: Layers = field(default=ALL, kw_only=True)  # positions are those of earlier versions
    importance: Importance = "random"
    structure: Structure = field(default="multilevel", kw_only=True)
    order: Literal["largest", "smallest", "sampled"] = "largest"
    allocation: Literal["per_layer", "global", "flops"] = "per_layer"
    num_samples: Annotated[int | float, SAMPLES] | None = 128
    reselect_steps: Annotated[int, EVERY] = 0
    reselect_by: ReselectBy = field(default="running", kw_only=True)
    max_rank: Annotated[int, AT_LEAST_1] | None = None
    exclude: list[Annotated[str, FOLDER]] | None = None
    residual: bool = field(default=False, kw_only=True)
    seed: int = 0

    def validate(self) -> None:
        super().validate()
        if self.allocation == "flops" and self.order != "largest":
            raise UserError(
                f"method.allocation=flops weighs the scores against the cost of a step, so method.order={self.order} "
                "means nothing there: use method.order=largest."
            )
        if self.max_rank is not None and self.reselect_steps:
            raise UserError(
                f"method.max_rank={self.max_rank} and method.reselect_steps={self.reselect_steps}: an export holds all "
                "that ever trained, so choosing anew goes beyond any rank; give one of them."
            )

    @property
    def wanted_sparsity(self) -> float | None:
        return self.sparsity if self.sparsity is not None else DEFAULT_SPARSITY

    @property
    def needs_data(self) -> bool:
        """Whether choosing needs calibration batches."""
        return self.importance not in IMPORTANCES_WITHOUT_DATA

    def budget(self, spec: ModelSpec) -> Budget:
        """What may be chosen and how much of it."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """Settings of importance sylva's statistics (`importance.kfac.FactorSettings`) that are not its defaults."""
        return {"structure": self.structure}

    def with_block_size(self, size: int | None) -> Self:
        """The settings with the block size of a selection that the caller has made."""
        return self

    def layout_plan(self, model: nn.Module, selection: Selection, spec: ModelSpec) -> Any:
        """The orders in which an attached model is to store what trains (`permuted_layout.Plan`); None: as it is."""
        return None

    def convert(self, model: nn.Module, selection: Selection | None, spec: ModelSpec | None) -> nn.Module:
        from sparseft.layers import convert

        return convert(model, selection.modules, selection.block_size)

    def for_benchmark(self) -> Self:
        # Which units train takes the same time; how far down `flops` goes is for the data to say, so all the way.
        scored = self.allocation == "flops" and self.importance != "random"
        return replace(self, importance="random", allocation="global" if scored else self.allocation, exclude=None)
