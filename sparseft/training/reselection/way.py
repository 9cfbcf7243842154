"""The way in which a run chooses anew what trains."""

from __future__ import annotations

from typing import Any

from sparseft import console
from sparseft.data.sampling import calibration_batches
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import as_trained, reselect
from sparseft.selection.exclude import read_excluded
from sparseft.selection.selection import Selection
from sparseft.training.prepare import Prepared
from sparseft.training.reselection.running import Running
from sparseft.training.reselection.swap import Reselection
from sparseft.training.reselection.turns import Turns, turns_of

SHORTER = "re-selection by calibration takes less with shorter examples (trainer.max_length), in a new run"


def reselecting(
    method: Any, prepared: Prepared, spec: ModelSpec, trainer: Any, *, ended_at: int | None, resumed: str | None
) -> Reselection:
    """What chooses anew every `method.reselect_steps` steps: by the same importance, on other samples each time, or by
    what training shows, of all layers or of one.

    resumed: the checkpoint that the run goes on from; ended_at: its step, where that was to be the run's last one.
    """
    clock = trainer.run_state.clock
    if method.reselects_running and method.reselects_in_turn:
        return Turns(
            method.reselect_steps,
            prepared.model,
            turns_of(prepared.model, spec),
            order=method.order,
            seed=method.seed,
            clock=clock,
            ended_at=ended_at,
            resumed=resumed,
        )
    excluded = read_excluded(method.exclude)  # now: the folders may go while it trains
    if method.reselects_running:
        console.log(
            f"selection: anew every {method.reselect_steps} steps by the gradients of the steps themselves "
            f"(method.reselect_by=running); importance {method.importance} makes the first choice alone"
        )
        return Running(
            method.reselect_steps,
            prepared.model,
            spec,
            as_trained(prepared.model, method, spec=spec, excluded=excluded),
            order=method.order,
            seed=method.seed,
            clock=clock,
            ended_at=ended_at,
            resumed=resumed,
        )

    def choose(step: int) -> Selection:
        seed = method.seed + step
        batches = None
        if method.needs_data:
            batches = calibration_batches(prepared.data.train, method.num_samples, seed, prepared.pad)
        with trainer.advising_memory(SHORTER):
            return reselect(prepared.model, method, batches, seed=seed, spec=spec, excluded=excluded)

    return Reselection(method.reselect_steps, choose, clock, ended_at)
