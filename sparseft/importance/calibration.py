"""One pass over the calibration samples: split over the ranks, resumable, and reduced to the sums of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sparseft import console
from sparseft.distributed import ranks
from sparseft.importance.calibration_state import STATISTICS, Partial
from sparseft.importance.hooks import no_samples, observe


class Statistics(Protocol):
    """An observer of `statistics.observe` whose sums can be kept, taken up again and reduced."""

    def __call__(self, name: str, x: Tensor, y: Tensor | None, grad: Tensor | None, source: str) -> None: ...

    def starting(self, samples: int) -> None:
        """The next calls show so many samples at once."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums, live, and what else belongs to them (as JSON)."""

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over a `state()`."""

    def reduce(self) -> None:
        """Adds up the sums of all ranks, in place on each."""


def keep(partial: Partial, statistics: Statistics, done: tuple[int, int]) -> None:
    """Saves the statistics after `done` (groups, samples)."""
    if partial.folder is not None:
        tensors, meta = statistics.state()
        partial.save(STATISTICS, tensors, {"statistics": meta, "done": done})


def collect(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Any]],
    statistics: Statistics,
    *,
    gradients: bool,
    partial: Partial,
    together: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Shows `statistics` the samples that it has not seen yet, and returns this rank's (groups, samples).

    An exception out of `progress` (an interruption, say) leaves the state saved: nothing is half done there.
    `progress` gets the number of samples that all ranks have done by this one's count.
    """
    rank, world = ranks.rank_and_world()
    done = (0, 0)
    if (saved := partial.load(STATISTICS)) is not None:
        tensors, meta = saved
        statistics.load(tensors, meta["statistics"])
        done = (meta["done"][0], meta["done"][1])
        console.log(f"calibration: goes on after {done[1]} samples")

    def reached(groups: int, samples: int) -> None:
        nonlocal done
        done = (groups, samples)
        saved = partial.due()
        if saved:
            keep(partial, statistics, done)
        try:
            if progress is not None:
                progress(samples * world)
        except BaseException:
            if not saved:
                keep(partial, statistics, done)
            raise

    observe(
        model,
        names,
        batches,
        statistics,
        gradients=gradients,
        together=together,
        share=(rank, world),
        done=done,
        starting=statistics.starting,
        reached=reached,
    )
    if world > 1:
        if partial.due():
            keep(partial, statistics, done)  # these are the rank's own sums; in a moment they are everybody's
        if sum(ranks.all_gather_object(done[1])) == 0:
            raise no_samples()
        statistics.reduce()
    return done
