"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), through `peft`: the baselines of equal size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from sparseft import console
from sparseft.config import SPARSITY
from sparseft.errors import UserError, nearest
from sparseft.methods.base import DEFAULT_SPARSITY, RANK, Layers, MethodConfig
from sparseft.models.chosen_layers import ALL
from sparseft.rules import ABOVE_0, Rule

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.selection import Selection

TARGETS = Rule(
    lambda value: not isinstance(value, str), "a list such as [q_proj,v_proj], or null for all linears in scope"
)
Targets = Annotated[list[str] | str, TARGETS]  # no text is one: the rule says what is
PROBABILITY = Rule(lambda value: 0.0 <= value < 1.0, "a probability from 0 to below 1")


@dataclass
class LoraConfig(MethodConfig):
    """`rank`, or the rank whose parameters are nearest to the share (1 − sparsity) of the weights in scope."""

    name = "lora"
    kind = "peft"
    learning_rate = 2e-4
    products = 3  # forward, the gradient through it, and its own

    sparsity: Annotated[float, SPARSITY] | None = None
    scope: str | None = None
    layers: Layers = field(default=ALL, kw_only=True)  # positions are those of earlier versions
    rank: Annotated[int, RANK] | None = None
    alpha: Annotated[float, ABOVE_0] | None = None
    dropout: Annotated[float, PROBABILITY] = 0.05
    targets: Targets | None = None
    use_dora: bool = False
    seed: int = 0

    @property
    def wanted_sparsity(self) -> float | None:
        if self.rank is not None:
            return None
        return self.sparsity if self.sparsity is not None else DEFAULT_SPARSITY

    @property
    def separable(self) -> bool:  # type: ignore[override]
        """DoRA's magnitudes are no part of a sum."""
        return not self.use_dora

    def validate(self) -> None:
        super().validate()
        if self.rank is not None and self.sparsity is not None:
            raise UserError(f"sparsity={self.sparsity} and method.rank={self.rank} both set the size: give one.")
        if self.targets is not None and not self.targets:
            raise UserError("method.targets is empty: name at least one module, or null for all linears in scope.")

    def convert(self, model: nn.Module, selection: Selection | None, spec: ModelSpec | None) -> nn.Module:
        import peft
        import torch

        from sparseft.layers.convert import check_modules
        from sparseft.methods.exact_targets import exact_targets, lora_modules, others

        spec = spec.narrowed(self.layers)
        rank, targets = rank_for(spec, self), target_modules(spec, self)
        smallest = min(targets, key=lambda name: min(spec.linears[name]))
        if self.rank is None and rank > (most := min(spec.linears[smallest])):
            console.warn(
                f"sparsity={self.wanted_sparsity} asks for rank {rank}, and the smallest linear with an adapter, "
                f"{smallest}, has rank {most}: more adds nothing there; raise sparsity or give method.rank"
            )
        check_modules(model, targets, spec.linears)  # merging into a tied weight would change the other too
        peft_config = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=self.alpha if self.alpha is not None else 2 * rank,
            lora_dropout=self.dropout,
            target_modules=targets,
            exclude_modules=others(model, targets),
            use_dora=self.use_dora,
            fan_in_fan_out=bool(spec.transposed),  # Conv1D keeps its weight as (in, out)
        )
        with torch.random.fork_rng(devices=[]), exact_targets(), whole_where_read():
            torch.manual_seed(self.seed)
            wrapped = peft.get_peft_model(model, peft_config)
        assert set(lora_modules(wrapped, "default")) == set(targets)
        return wrapped.train(model.training)  # peft's new modules would drop out in evaluation mode too

    def granularity(self, selection: Selection | None) -> str | None:
        return "whole ranks"

    def lora_rank(self, spec: ModelSpec) -> int | None:
        return None if self.use_dora else rank_for(spec, self)

    def for_benchmark(self) -> Self:
        return replace(self, dropout=0.0)


@dataclass
class DoraConfig(LoraConfig):
    """LoRA with trained weight magnitudes."""

    name = "dora"

    use_dora: bool = True


@contextlib.contextmanager
def whole_where_read() -> Iterator[None]:
    """Inside, peft has a base's weight whole where DoRA takes its norms: of shards it knows DeepSpeed's alone."""
    from peft.tuners.lora import dora

    from sparseft.distributed.shards import gathered

    usual = dora.gather_params_ctx
    dora.gather_params_ctx = lambda parameters, *_, **__: gathered(parameters)
    try:
        yield
    finally:
        dora.gather_params_ctx = usual


def target_modules(spec: ModelSpec, config: LoraConfig) -> list[str]:
    """The full names of the linears that get an adapter; a target that matches nothing is refused."""
    names = [name for name in spec.linears_in(config.scope) if name not in spec.stacked]
    if not names:
        raise UserError(f"scope={config.scope} holds only experts kept as 3-D parameters, which LoRA does not train.")
    if config.targets is None:
        return names
    for target in config.targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            spec.check_trains(n for n in spec.frozen if n.endswith(f".{target}") and (config.scope or "") in n)
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(f"method.targets: no linear in scope is called '{target}'.{nearest(target, leaves)}")
    return [name for name in names if any(name == target or name.endswith("." + target) for target in config.targets)]


def rank_for(spec: ModelSpec, config: LoraConfig) -> int:
    """The rank set, or the one whose parameter count is nearest to (1 − sparsity) × the weights in scope."""
    if config.rank is not None:
        return config.rank
    shapes = [spec.linears[name] for name in target_modules(spec, config)]
    wanted = (1.0 - (config.wanted_sparsity or DEFAULT_SPARSITY)) * spec.weights_in(config.scope)
    if config.use_dora:  # a magnitude for each output feature, whatever the rank
        wanted -= sum(rows for rows, _ in shapes)
    rank = max(1, round(wanted / sum(rows + columns for rows, columns in shapes)))
    if spec.layers is not None and rank > (most := min(map(min, shapes))):
        raise UserError(
            f"sparsity={config.wanted_sparsity} asks for rank {rank} in the layers of method.layers, whose smallest "
            f"linear has rank {most}: raise sparsity or name more layers."
        )
    return rank
