"""Sylva's importance from the mean gradient and the second moments of a linear layer's inputs and output gradients
(doi 10.1145/3650200.3656619).
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseft.distributed import ranks
from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr import Hodlr
from sparseft.importance.hooks import Observation
from sparseft.importance.multilevel import Multilevel
from sparseft.importance.room import DEVICE, Room
from sparseft.importance.second_moment import SecondMoment, full_precision
from sparseft.importance.units import Candidate, sum_features
from sparseft.kernels.reference import FP32_PRODUCTS, token_product

# Which sums there are: what was kept of others is no use.
SUMS = "half leaves"

# Linears that are scored at once where the sums are on an accelerator: each takes a copy of a few slices of its own.
DEVICE_JOBS = 8


# Measured: docs/benchmarks/importance.md; HODLR's is the paper's, dense matrices have none.
RANKS = {"multilevel": 16, "hodlr": 1, "dense": 1}


@dataclass(frozen=True)
class FactorSettings:
    """How the Kronecker factors are kept, and the damping of their inverses."""

    structure: str = "multilevel"  # multilevel (`Multilevel`), hodlr (`Hodlr`) or dense, whatever the next two say
    num_partition: int = 8  # levels of halving
    rank: int | None = None  # None: that of RANKS
    damping: float = 1e-3

    def matrix(self, n: int, device: torch.device | str, seed: int = 0) -> SecondMoment:
        """An empty one of n features."""
        form = Hodlr if self.structure == "hodlr" else Multilevel
        rank = RANKS[self.structure] if self.rank is None else self.rank
        return form(n, 0 if self.structure == "dense" else self.num_partition, rank, device, seed)


def statistics_bytes(settings: FactorSettings, shapes: Iterable[tuple[int, int]]) -> int:
    """What the `KroneckerFactors` of linears of `shapes` (out, in) hold at most: where inputs are shared, less."""
    counts: Counter[int] = Counter()
    total = 0
    for rows, columns in shapes:
        counts.update((rows, columns))
        total += 4 * rows * columns
    return total + sum(
        count * sum(x.nbytes for x in settings.matrix(n, "meta").tensors()) for n, count in counts.items()
    )


class KroneckerFactors:
    """`calibration.Statistics` of sylva: per linear the Kronecker factors of its curvature (K-FAC), A of its inputs and
    G of its output gradients, and Σ of its per-sample gradients, in fp32 whatever the model's dtype. Modules with the
    same input share one A.

    Args:
        shapes: (out, in) of every module that will be observed.
        folder: for summed gradients that go to disk (`room.Room`); the matrices stay on the device.
    """

    def __init__(
        self,
        settings: FactorSettings,
        seed: int,
        shapes: Mapping[str, tuple[int, int]],
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self.settings, self.shapes, self.device = settings, shapes, device
        self.seed = seed
        self.inputs: dict[str, SecondMoment] = {}  # by source
        self.gradients: dict[str, SecondMoment] = {}  # by module
        self.sources: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}  # (out, in)
        self.room = Room(statistics_bytes(settings, shapes.values()), device, "the summed gradients", folder)

    def __call__(self, seen: Observation) -> None:
        name = seen.name
        assert seen.gradient is not None
        if name not in self.sources:
            self._open(name, seen.source)
        if name == self.sources[name]:
            self.inputs[name].update(seen.x)
        self.gradients[name].update(seen.gradient)
        _add_product(self.sums[name], seen.gradient, seen.x)

    def _open(self, name: str, source: str) -> None:
        rows, columns = self.shapes[name]
        self.sources[name] = source
        if source not in self.inputs:
            self.inputs[source] = self._matrix(columns)
        self.gradients[name] = self._matrix(rows)
        self.sums[name] = self.room.zeros(rows, columns)

    def _matrix(self, n: int) -> SecondMoment:
        # One seed for all: matrices of equal size then share their test matrix, and every rank draws the same.
        return self.settings.matrix(n, self.device, self.seed)

    # -- to keep, to take up again, to reduce --------------------------------------------------------------------------

    def _matrices(self) -> Iterator[tuple[str, SecondMoment]]:
        yield from ((f"A {name}", matrix) for name, matrix in self.inputs.items())
        yield from ((f"G {name}", matrix) for name, matrix in self.gradients.items())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums by name, live, and the modules with their sources."""
        tensors = {f"sum {name}": total for name, total in self.sums.items()}
        for name, matrix in self._matrices():
            tensors |= {f"{name} {i}": x for i, x in enumerate(matrix.tensors())}
        return tensors, {"sources": self.sources}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over a `state()` made with the same settings and shapes."""
        for name, source in meta["sources"].items():
            self._open(name, source)
            self.sums[name].copy_(tensors[f"sum {name}"])
        for name, matrix in self._matrices():
            for i, x in enumerate(matrix.tensors()):
                x.copy_(tensors[f"{name} {i}"])

    def reduce(self) -> None:
        """Adds up the sums of all ranks, one tensor at a time. Sketches are linear in x xᵀ, so theirs add up too."""
        sources: dict[str, str] = {}
        everywhere = ranks.all_gather_object((self.sources, self.room.place))
        for theirs, _ in everywhere:  # a rank may have seen no sample that reached an expert
            sources = {**theirs, **sources}
        # Each rank has looked at its own memory: of one tensor some on a device and some on the host would wait for
        # each other, by NCCL and by gloo.
        by_host = any(place != DEVICE for _, place in everywhere)
        order = [name for name in self.shapes if name in sources]
        for name in order:
            if name not in self.sources:
                self._open(name, sources[name])
        for name in order:
            total = self.sums[name]
            shared = total.cpu() if by_host else total
            ranks.all_reduce_sum(shared)
            if shared is not total:
                total.copy_(shared)
            for x in self.gradients[name].tensors():
                ranks.all_reduce_sum(x)
        for name in dict.fromkeys(sources[name] for name in order):
            for x in self.inputs[name].tensors():
                ranks.all_reduce_sum(x)

    # -- scores --------------------------------------------------------------------------------------------------------

    def score(
        self,
        modules: Mapping[str, Sequence[Candidate]],
        samples: int,
        finished: Callable[[list[str], dict[str, Tensor], list[float]], None],
    ) -> None:
        """Scores modules, those that share an input together.

        The mean gradient is that over `samples`, all of the calibration: a sample that reached no token of an expert
        counts with a gradient of zero. Else an expert of few samples would outweigh the linears that every sample goes
        through by the fourth power of their ratio.

        `finished` is called, on the calling thread, with the names of such modules, Σ O_o · I_i over each unit of their
        candidates (float64 on the CPU, by candidate key) and the effective damping of each of their matrices.
        """
        by_source: dict[str, list[str]] = defaultdict(list)
        for name in modules:
            by_source[self.sources.get(name, name)].append(name)
        jobs = [{name: modules[name] for name in names} for names in by_source.values()]
        threads = torch.get_num_threads()
        if threads == 1:
            for job in jobs:
                finished(list(job), *self._scored(job, samples))
            return
        # Hundreds of small decompositions, on the CPU wherever the sums are, which one thread does best: a job to each
        # thread, not threads to a job. The switch to full precision is the process's, so it is thrown here for all.
        workers = min(threads, len(jobs), threads if self.device.type == "cpu" else DEVICE_JOBS)
        if (
            self.device.type == "cuda"
        ):  # torch loads CUDA's decompositions with the first, and fails where two threads do
            torch.linalg.eigh(torch.ones(1, 1, device=self.device))
        pool = ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,))
        with full_precision(self.device), pool:
            torch.set_num_threads(1)  # MKL's number is the whole process's
            try:
                futures = {pool.submit(self._scored, job, samples): list(job) for job in jobs}
                for future in as_completed(futures):
                    finished(futures[future], *future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(threads)

    def _scored(
        self, modules: Mapping[str, Sequence[Candidate]], samples: int
    ) -> tuple[dict[str, Tensor], list[float]]:
        scores, dampings, seen = {}, [], {}
        for name, candidates in modules.items():
            if name not in self.sources:  # a module that no gradient reached
                scores |= {c.key: torch.zeros(c.count, dtype=torch.float64) for c in candidates}
                continue
            A, G = self.inputs[self.sources[name]], self.gradients[name]
            total = self.sums[name].to(A.device)
            sides = entry_importance(total, A, G, self.settings.damping)
            output, input = (side.cpu() / samples**2 for side in sides)  # of the mean, not the sum
            for c in candidates:
                if c.kind in ("blocks", "grid"):
                    scores[c.key] = block_scores(output, input, c.unit).reshape(-1)
                elif c.kind == "rows":
                    scores[c.key] = sum_features(output, c) * input.sum()
                else:
                    scores[c.key] = sum_features(input, c) * output.sum()
            for matrix in (A, G):
                if id(matrix) not in seen and matrix.effective_damping is not None:
                    dampings.append(matrix.effective_damping)
                seen[id(matrix)] = matrix
            G.release()
        for matrix in seen.values():
            matrix.release()
        return scores, dampings


def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total (out, in) float32 += gradient (tokens, out)ᵀ x (tokens, in), with at most a copy of one layer."""
    if total.device != x.device:
        total += token_product(gradient, x).to(total.device)
    elif FP32_PRODUCTS and x.is_cuda and x.dtype.itemsize == 2:
        total += token_product(gradient, x)  # on the tensor cores, summed in float32
    else:
        total.addmm_(gradient.float().t(), x.float())


def summary(dampings: Iterable[float], asked: float) -> dict[str, Any]:
    """How far the damping had to be raised, as `selection.json` records it."""
    found = sorted(dampings)
    if not found:
        return {"damping": asked, "matrices": 0, "raised": 0}
    middle = statistics.median_low(found)
    return {
        "damping": asked,
        "matrices": len(found),
        "raised": sum(damping > asked for damping in found),
        "effective_damping": {"min": found[0], "median": middle, "max": found[-1]},
    }


def entry_importance(
    mean_gradient: Tensor,  # (out, in)
    A: SecondMoment,  # mean a aᵀ of the inputs, (in, in)
    G: SecondMoment,  # mean g gᵀ of the output gradients, (out, out)
    damping: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """O (out,) and I (in,), float64 on the statistics' device; the score of entry (o, i) is their product O_o · I_i.

        O_o = Ḡ_{o,:} A Ḡ_{o,:}ᵀ / [G⁻¹]_oo,    I_i = Ḡ_{:,i}ᵀ G Ḡ_{:,i} / [A⁻¹]_ii

    Both are sizes of a squared quantity, so never negative: where truncation has left A or G indefinite
    (`Hodlr`) and a numerator falls below zero, it counts as zero (two negative factors would make a high score).
    ValueError where the shapes do not fit, RunError where the mean gradient is not finite.
    """
    if mean_gradient.shape != (G.n, A.n):
        raise ValueError(f"mean_gradient has shape {tuple(mean_gradient.shape)}; expected (out, in) = ({G.n}, {A.n}).")
    output = A.quadratic(mean_gradient.t()).clamp_min(0) / G.inverse_diagonal(damping)
    input = G.quadratic(mean_gradient).clamp_min(0) / A.inverse_diagonal(damping)
    if not (torch.isfinite(output).all() and torch.isfinite(input).all()):
        raise RunError("the second-order importance is not finite: the mean gradient holds inf or NaN.")
    return output, input


def block_scores(
    O: Tensor,  # (out,)  # noqa: E741
    I: Tensor,  # (in,)  # noqa: E741
    block_size: int,
) -> Tensor:
    """Σ O_o · I_i over each B×B block -> (ceil(out / B), ceil(in / B)), edge blocks included."""
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; expected at least 1.")

    def summed(side: Tensor) -> Tensor:
        return F.pad(side, (0, -len(side) % block_size)).view(-1, block_size).sum(1)

    return torch.outer(summed(O), summed(I))
