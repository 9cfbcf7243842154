"""One pass over the calibration samples: split over the ranks, resumable, and reduced to the sums of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.importance.batching import Share, groups_of
from sparseft.importance.calibration_state import STATISTICS, CalibrationState
from sparseft.importance.hooks import Observation, observe


@dataclass(frozen=True)
class Watch:
    """How long work is followed, ended and taken up again. An exception out of `sampled` or `scored` ends it with what
    is done saved in `resume`."""

    sampled: Callable[[int], None] | None = None  # called with the number of samples done
    scored: Callable[[int, int], None] | None = None  # with (linears scored, linears), where that is a pass of its own
    resume: Path | None = None  # a folder for unfinished work


class Statistics(Protocol):
    """An observer of `hooks.observe` whose sums can be kept, taken up again and reduced."""

    def __call__(self, seen: Observation) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums, live, and what else belongs to them (as JSON)."""

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over a `state()`."""

    def reduce(self) -> None:
        """Adds up the sums of all ranks, in place on each."""


def keep(state: CalibrationState, statistics: Statistics, done: tuple[int, int]) -> None:
    """Saves the statistics after `done` (groups, samples)."""
    if state.folder is not None:
        tensors, meta = statistics.state()
        state.save(STATISTICS, tensors, {"statistics": meta, "done": done})


@dataclass(frozen=True)
class Calibration:
    """A model, its calibration batches, and what is known and reported of the pass over them."""

    model: nn.Module
    batches: Iterable[Mapping[str, Any]]
    state: CalibrationState
    watch: Watch

    def collect(
        self, names: Iterable[str], statistics: Statistics, *, gradients: bool, together: int = 0
    ) -> tuple[int, int]:
        """Shows `statistics` the samples that it has not seen yet, and returns this rank's (groups, samples).

        An exception out of `watch.sampled` leaves the state saved. It gets the number of samples that all ranks have
        done by this one's count. UserError where no sample can be used.
        """
        rank, world = ranks.rank_and_world()
        done = (0, 0)
        if (saved := self.state.load(STATISTICS)) is not None:
            tensors, meta = saved
            statistics.load(tensors, meta["statistics"])
            done = (meta["done"][0], meta["done"][1])
            console.log(f"calibration: goes on after {done[1]} samples")

        def reached(samples: int) -> None:
            nonlocal done
            done = (done[0] + bool(samples), done[1] + samples)
            saved = self.state.due()
            if saved:
                keep(self.state, statistics, done)
            try:
                if self.watch.sampled is not None:
                    self.watch.sampled(done[1] * world)
            except BaseException:
                if not saved:
                    keep(self.state, statistics, done)
                raise

        share = Share(rank, world, done[0])
        groups = groups_of(self.model, self.batches, gradients=gradients, together=together, share=share)
        observe(self.model, names, groups, statistics, gradients=gradients, reached=reached)
        if world > 1 and self.state.due():
            keep(self.state, statistics, done)  # these are the rank's own sums; in a moment they are everybody's
        if sum(ranks.all_gather_object(done[1])) == 0:
            raise UserError("the calibration batches hold no sample with a labelled token, so nothing can be scored.")
        if world > 1:
            statistics.reduce()
        return done
