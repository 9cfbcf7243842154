"""Learning-rate schedules, transformers' own: what they take besides warm-up and steps, checked before anything is
loaded, and where a continued run goes on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import optimization
from transformers.trainer_utils import SchedulerType

from sparseft import console
from sparseft.config import TrainerConfig
from sparseft.errors import UserError, nearest, reason_of

MEASURED = ("reduce_lr_on_plateau", "greedy")  # follow the held-out loss; all others are functions of the step
# Arguments that the Trainer passes itself or that are settled here: `mode` (a loss decreases), `verbose` (stdout is
# for results).
_PASSED = {"num_warmup_steps": "trainer.warmup_steps", "num_training_steps": "trainer.max_steps"}
_NOT_OURS = {"optimizer", "last_epoch", "mode", "verbose", "kwargs", *_PASSED}
_ONE_OF = ("min_lr", "min_lr_rate")  # of schedules that have both
_ANY_LENGTH = 1_000_000  # steps, where the data are not counted yet
_LOOKED_AT = 20_000  # steps of a schedule, at most


def warmup_steps(config: TrainerConfig, total_steps: int) -> int:
    """Optimizer steps of the warm-up: a tenth of a run that is no longer than the warm-up asked for."""
    return total_steps // 10 if config.warmup_steps >= total_steps > 0 else config.warmup_steps


def check(config: TrainerConfig, learning_rate: float | None, total_steps: int | None) -> None:
    """Refuses a schedule that could not be followed to its end, by building it and looking at its rates.

    learning_rate, total_steps: None where it is not known yet, as it is to be found and the data are not counted.
    Raises `UserError`.
    """
    name, given = config.scheduler, config.scheduler_args or {}
    known = [str(item.value) for item in SchedulerType]
    if name not in known:
        raise UserError(f"trainer.scheduler={name}: unknown.{nearest(name, known)}")
    _check_names(name, given)
    _check_values(name, given)
    if name in MEASURED and not config.eval_steps:
        raise UserError(
            f"trainer.scheduler={name}: it follows the loss on held-out examples, so it needs trainer.eval_steps, the "
            "optimizer steps between evaluations."
        )
    steps = total_steps or _ANY_LENGTH
    _check_fits(config, given, steps if total_steps else None)
    shown = "".join(f" with trainer.scheduler_args.{key}={value}" for key, value in given.items())
    try:
        rates = _rates(name, given, learning_rate or 1.0, warmup_steps(config, steps), steps)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UserError(f"trainer.scheduler={name}{shown}: cannot be followed ({reason_of(error)}).") from error
    for step, rate in rates.items():
        if isinstance(rate, complex) or not math.isfinite(rate) or rate < 0:
            raise UserError(f"trainer.scheduler={name}{shown}: its learning rate after {step} steps would be {rate}.")
        if learning_rate is not None and rate > learning_rate * (1 + 1e-9):
            raise UserError(
                f"trainer.scheduler={name}{shown}: its learning rate after {step} steps would be {rate:.4g}, more than "
                f"the run's highest, {learning_rate} (trainer.learning_rate)."
            )
    if learning_rate is not None:
        _check_bounds(name, given, learning_rate)
    if rates and total_steps:
        _check_zero(f"trainer.scheduler={name}{shown}", rates, total_steps)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """What trainer.scheduler_args may hold for a schedule."""
    function: Any = optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    if name in MEASURED:  # their functions pass **kwargs on to these classes
        function = ReduceLROnPlateau if name == MEASURED[0] else optimization.GreedyLR
    return {key: entry for key, entry in inspect.signature(function).parameters.items() if key not in _NOT_OURS}


def _check_names(name: str, given: dict[str, Any]) -> None:
    taken = _parameters(name)
    for key in given:
        if key in taken:
            continue
        if key in _PASSED:
            raise UserError(f"trainer.scheduler_args.{key}: {_PASSED[key]} sets that.")
        near = nearest(key, taken) if taken else " It takes none."
        raise UserError(f"trainer.scheduler_args.{key}: trainer.scheduler={name} has no such setting.{near}")
    needed = [key for key, entry in taken.items() if entry.default is entry.empty and key not in given]
    if not needed and set(_ONE_OF) <= taken.keys():
        count = sum(given.get(key) is not None for key in _ONE_OF)
        if count > 1:
            raise UserError(f"trainer.scheduler={name}: trainer.scheduler_args has {' and '.join(_ONE_OF)}: give one.")
        needed = [] if count else [" or ".join(_ONE_OF)]
    if needed:
        example = needed[0].split()[0]
        raise UserError(
            f"trainer.scheduler={name}: needs {' and '.join(needed)} in trainer.scheduler_args, as in "
            f"trainer.scheduler_args.{example}=…."
        )


def _check_values(name: str, given: dict[str, Any]) -> None:
    """Refuses values that no schedule takes: a number below 0, and another type than the default's.

    Without a default, or where it is None, a number is expected: of steps, or a share of a rate.
    """
    taken = _parameters(name)
    for key, value in given.items():
        default = taken[key].default
        needless = default is None  # null is accepted where it is the default
        if isinstance(default, bool | str):
            fits, expected = type(value) is type(default), "text" if isinstance(default, str) else "true or false"
        else:
            entries, expected = value if isinstance(value, list) else [value], "a number of at least 0"
            fits = all(needless if one is None else type(one) in (int, float) and one >= 0 for one in entries)
        if not fits:
            raise UserError(f"trainer.scheduler_args.{key}={value}: trainer.scheduler={name} takes {expected} there.")


def _check_fits(config: TrainerConfig, given: dict[str, Any], total_steps: int | None) -> None:
    """Refuses phases counted in steps that are no counts, or longer than the run together."""
    counts = {key: given[key] for key in ("num_stable_steps", "num_decay_steps") if given.get(key) is not None}
    for key, count in counts.items():
        if type(count) is not int or count < 0:
            raise UserError(f"trainer.scheduler_args.{key}={count}: expected a whole number of at least 0.")
    if not counts or total_steps is None:
        return
    warmup = warmup_steps(config, total_steps)
    if warmup + sum(counts.values()) > total_steps:
        listed = " and ".join(f"trainer.scheduler_args.{key}={count}" for key, count in counts.items())
        raise UserError(
            f"{listed}: together with {warmup} steps of warm-up (trainer.warmup_steps) more than the run's "
            f"{total_steps} steps."
        )


def _rates(name: str, given: dict[str, Any], rate: float, warmup: int, total: int) -> dict[int, Any]:
    """The learning rates after so many steps (the last one is never used); none where the held-out loss decides."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]  # with and without weight decay
    optimizer = torch.optim.SGD(groups, lr=rate)
    schedule: Any = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=dict(given)
    )
    if name in MEASURED:
        for _ in range(1000):  # a loss that stays as it is
            schedule.step(1.0)
        return {}
    stride = max(1, total // _LOOKED_AT)
    return {step: rate * schedule.lr_lambdas[0](step) for step in (*range(0, total, stride), total)}


def _check_bounds(name: str, given: dict[str, Any], rate: float) -> None:
    """Refuses bounds that would never let the rate move."""
    if name not in MEASURED:
        return
    for key, entry in _parameters(name).items():
        if key in ("min_lr", "max_lr"):
            bounds = given.get(key, entry.default)
            for bound in bounds if isinstance(bounds, Sequence) else [bounds]:
                if bound >= rate if key == "min_lr" else bound < rate:
                    raise UserError(
                        f"trainer.scheduler={name}: its {key} is {bound}, expected "
                        f"{'less' if key == 'min_lr' else 'no less'} than the learning rate ({rate}); give "
                        f"trainer.scheduler_args.{key}=…."
                    )


def _check_zero(what: str, rates: dict[int, float], total: int) -> None:
    """Says of a schedule that its last steps train nothing."""
    used = [step for step in rates if step < total]
    last = max((step for step in used if rates[step] > 0), default=None)
    if last is None:
        raise UserError(f"{what}: the learning rate would be 0 in all of the run's {total} steps.")
    if total - last > 2:
        console.warn(f"{what}: the learning rate is 0 after step {last + 1} of {total}, so the rest trains nothing")


def go_on(schedule: Any, base_rates: Sequence[float], step: int) -> None:
    """Puts a schedule that a checkpoint's state was loaded into after `step` steps of the run as it is set now.

    The state holds rates of the schedule as it was then, perhaps for another number of steps: the rate that follows is
    the one that an uninterrupted run with the present settings has there. What follows the loss goes on from its state.

    base_rates: those of the fresh schedule, before its state was loaded, one a group.
    """
    if hasattr(schedule, "lr_lambdas"):
        schedule.base_lrs, schedule.last_epoch = list(base_rates), step - 1
        schedule.step()
    else:
        for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
