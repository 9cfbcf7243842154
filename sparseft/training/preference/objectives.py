"""Which of TRL's trainers each objective is, and with what settings."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseft.config import TrainerConfig
from sparseft.data.preference_sets import UNPAIRS


@dataclass(frozen=True)
class Objective:
    """A loss of TRL's. It compares with the base where it has a reference; else with nothing."""

    module: str
    name: str  # of its trainer and configuration: DPO -> DPOTrainer, DPOConfig
    reference: bool
    beta: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its configuration

    def trainer(self) -> type:
        """The class of TRL's trainer."""
        return getattr(_quietly_imported(self.module), f"{self.name}Trainer")

    def configuration(self) -> type:
        """The class of its arguments, a `TrainingArguments`."""
        return getattr(_quietly_imported(self.module), f"{self.name}Config")

    def arguments(self, config: TrainerConfig, pad: int) -> dict[str, Any]:
        """What its configuration says beside the training arguments. Sequences are cut before they come here."""
        beta = self.beta if config.beta is None else config.beta
        own = {name: value(beta) if callable(value) else value for name, value in self.settings.items()}
        return {"beta": beta, **({"padding_value": pad} if self.name == "ORPO" else {}), **own}


UNCUT = {"max_length": None}
OBJECTIVES = {
    "dpo": Objective("trl", "DPO", True, settings={"loss_type": ["sigmoid"], **UNCUT}),
    "ipo": Objective("trl", "DPO", True, settings={"loss_type": ["ipo"], **UNCUT}),
    "kto": Objective("trl", "KTO", True, settings=UNCUT),
    "orpo": Objective("trl.experimental.orpo", "ORPO", False, settings={"max_length": 2**31}),
    # The paper's margin is half of its beta, and it adds no likelihood of the better answer.
    "simpo": Objective(
        "trl.experimental.cpo", "CPO", False, beta=2.0,
        settings={"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": lambda beta: beta / 2, "max_length": 2**31},
    ),
}  # fmt: skip


def sequences(objective: str) -> int:
    """Of each example that is counted (`trainer.batch_size`): two of a pair, one of imitation and of `kto`."""
    return 2 if objective in OBJECTIVES and objective != UNPAIRS else 1


def _quietly_imported(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL calls experimental
        return importlib.import_module(module)
