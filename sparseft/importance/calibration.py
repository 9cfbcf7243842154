"""One pass over the calibration samples: split over the ranks, resumable, and reduced to the sums of all ranks.

An interrupted one leaves a safetensors file for the statistics of a rank and one for the scores it has finished, each
written aside and renamed; the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.files.atomic import asides, replaced_file
from sparseft.files.untrusted import parse_json
from sparseft.importance.batching import Share, groups_of
from sparseft.importance.hooks import Observation, observe

# Between two saves pass at least so many seconds, and at least so many times as long as the last save took: the sums
# of a large model are tens of gigabytes. The first one is taken to write so many bytes a second.
SAVE_SECONDS = 30.0
SAVE_COST = 20.0
SAVE_RATE = 5e8

STATISTICS, SCORES = "statistics", "scores"


def saved_samples(folder: Path) -> int:
    """Samples that the statistics in a folder have seen, 0 where there are none."""
    with contextlib.suppress(Exception):  # what is wrong with the file is said when it is loaded
        from safetensors import safe_open

        with safe_open(next(folder.glob(f"{STATISTICS}-0of*.safetensors")), "pt") as file:
            return max(0, int(parse_json(file.metadata()["meta"])["done"][1]))
    return 0


def _hash(tensors: Mapping[str, Tensor], meta: str) -> str:
    """SHA-256 over names, types, shapes and bytes of contiguous CPU tensors, and the description's text."""
    import torch

    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class CalibrationState:
    """The folder of an unfinished calibration. With `folder` None nothing is kept and nothing found.

    Args:
        folder: made when something is saved.
        key: everything but the samples that the state depends on, as JSON; another key's state is not used.
        share: (rank, ranks); each rank has files of its own.
    """

    def __init__(self, folder: Path | None, key: Any, share: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self.digest = hashlib.sha256(json.dumps([key, share], sort_keys=True).encode()).hexdigest()
        self.suffix = f"-{share[0]}of{share[1]}.safetensors"
        self._saved_at = time.monotonic()
        self._last_cost = 0.0

    def expect(self, size: int) -> None:
        """How many bytes a save will write."""
        self._last_cost = size / SAVE_RATE

    def due(self) -> bool:
        """Whether it is time to save again."""
        waited = time.monotonic() - self._saved_at
        return self.folder is not None and waited >= max(SAVE_SECONDS, SAVE_COST * self._last_cost)

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replaces a file. A full disk costs the chance to resume, not the work: it is said, and that is all."""
        if self.folder is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        start = time.monotonic()
        path = self.folder / (name + self.suffix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {key: value.cpu().contiguous() for key, value in tensors.items()}
            content = {"key": self.digest, "meta": json.dumps(meta)}
            with replaced_file(path, sync=False) as aside:
                save_file(kept, aside, content | {"sha256": _hash(kept, content["meta"])})
        except (OSError, SafetensorError) as error:
            console.warn(f"{self.folder}: what is done so far could not be kept, so it cannot be resumed ({error})")
            self.folder = None
        self._saved_at = time.monotonic()
        self._last_cost = self._saved_at - start

    def has(self, name: str) -> bool:
        """Whether there is such a file, of use or not."""
        return self.folder is not None and (self.folder / (name + self.suffix)).is_file()

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A file's tensors and description; None where there is none, or, with a word, where it is of no use."""
        if self.folder is None:
            return None
        path = self.folder / (name + self.suffix)
        for aside in asides(self.folder, path.name):  # of a process that was killed while it saved
            aside.unlink(missing_ok=True)
        if not path.is_file():
            return None
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                content = file.metadata() or {}
                if content.get("key") != self.digest:
                    console.log(f"{path}: belongs to other settings, so calibration starts anew")
                    return None
                found = {key: file.get_tensor(key) for key in file.keys()}
            if content.get("sha256") != _hash(found, content.get("meta", "")):
                raise ValueError("its content is not what was written")
            return found, parse_json(content["meta"])
        except Exception as error:  # a damaged file of any kind
            console.warn(f"{path}: cannot be used, so calibration starts anew ({error})")
            return None


def check_samples(count: int) -> None:
    """UserError where no rank has a sample; `count` are this one's."""
    if sum(ranks.all_gather_object(count)) == 0:
        raise UserError("the calibration batches hold no sample with a labelled token, so nothing can be scored.")


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
            keep(self.state, statistics, done)  # now: after the reduction they are no longer this rank's own sums
        check_samples(done[1])
        if world > 1:
            statistics.reduce()
        return done
