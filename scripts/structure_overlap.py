"""How near each structure of Sylva's second moments comes to the exact choice: as in docs/benchmarks/importance.md.

    python scripts/structure_overlap.py [--structures multilevel,hodlr,hodlr:8] OVERRIDES

OVERRIDES are those of `sparseft preprocess` with method=sylva. In one calibration pass every structure (with a rank, if
not its own) is shown the same samples, dense matrices among them. Of each linear: which share of the blocks that the
dense matrices choose is chosen too. Beside it how many matrices took more damping, what the matrices' sums hold, and
CPU seconds of summing and of scoring. The last row chooses by the squared mean gradient alone.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from sparseft import console
from sparseft.compose.run_config import compose
from sparseft.data.sampling import calibration_batches
from sparseft.importance.batching import groups_of
from sparseft.importance.hooks import Observation, observe
from sparseft.importance.kfac import FactorSettings, block_scores, entry_importance
from sparseft.importance.scores import TOKENS_TOGETHER
from sparseft.importance.second_moment import SecondMoment
from sparseft.importance.units import sum_units
from sparseft.kernels.reference import token_product
from sparseft.models.spec import ModelSpec
from sparseft.selection.choose import choose
from sparseft.selection.compute import Request
from sparseft.training.prepare import prepare

EXACT, GRADIENT = "dense", "mean gradient"
COLUMNS = ["structure", "mean", "least", "more damping", "MiB", "summing, s", "scoring, s"]


class Moments:
    """A and G of all linears in one structure, and the CPU seconds their sums took."""

    def __init__(self, settings: FactorSettings) -> None:
        self.settings = settings
        self.inputs: dict[str, SecondMoment] = {}  # by source
        self.gradients: dict[str, SecondMoment] = {}  # by module
        self.sources: dict[str, str] = {}
        self.summing = 0.0

    def __call__(self, seen: Observation) -> None:
        start = time.process_time()
        assert seen.gradient is not None
        for matrices, name, x in ((self.inputs, seen.source, seen.x), (self.gradients, seen.name, seen.gradient)):
            if name not in matrices:
                matrices[name] = self.settings.matrix(x.shape[1], x.device)
        self.sources[seen.name] = seen.source
        if seen.name == seen.source:
            self.inputs[seen.source].update(seen.x)
        self.gradients[seen.name].update(seen.gradient)
        self.summing += time.process_time() - start

    def scores(self, name: str, gradient: Tensor, block_size: int) -> Tensor:
        """Of each block of a linear."""
        A, G = self.inputs[self.sources[name]], self.gradients[name]
        sides = entry_importance(gradient, A, G, self.settings.damping)
        G.release()  # A may be its siblings' too
        return block_scores(*sides, block_size).reshape(-1).cpu()

    @property
    def matrices(self) -> list[SecondMoment]:
        return [*self.inputs.values(), *self.gradients.values()]

    def mebibytes(self) -> float:
        return sum(x.nbytes for matrix in self.matrices for x in matrix.tensors()) / 2**20


def main(words: Sequence[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", default="multilevel,hodlr", metavar="STRUCTURE[:RANK],…")
    given, overrides = parser.parse_known_args(words)
    structures = given.structures.split(",")
    config = compose("preprocess", overrides)
    prepared = prepare(config)
    model, method = prepared.model, config.method
    request = Request.of(ModelSpec.of(model), method)
    candidates = {c.module: c for c in request.budget.candidates}
    size = request.settings.block_size

    every = {name: Moments(_settings(name, request)) for name in dict.fromkeys([EXACT, *structures])}
    totals: dict[str, Tensor] = {}

    def see(seen: Observation) -> None:
        assert seen.gradient is not None
        totals[seen.name] = totals.get(seen.name, 0) + token_product(seen.gradient, seen.x)
        for moments in every.values():
            moments(seen)

    batches = calibration_batches(prepared.data.train, method.num_samples, method.seed, prepared.pad)
    groups = groups_of(model, batches, gradients=True, together=TOKENS_TOGETHER)
    samples = observe(model, candidates, groups, see, gradients=True)

    found, rows = {}, []
    for name, moments in every.items():
        start = time.process_time()
        scores = {c.key: moments.scores(module, totals[module], size) for module, c in candidates.items()}
        seconds = time.process_time() - start
        found[name] = _chosen(request, scores)
        raised = sum(matrix.effective_damping != method.damping for matrix in moments.matrices)
        costs = [f"{raised} of {len(moments.matrices)}", moments.mebibytes(), moments.summing, seconds]
        rows.append([name, *_overlaps(found[name], found[EXACT]), *costs])
    squares = {c.key: sum_units(totals[module].square(), c).double() for module, c in candidates.items()}
    rows.append([GRADIENT, *_overlaps(_chosen(request, squares), found[EXACT]), "", "", "", ""])

    tokens = every[EXACT].matrices[0].tokens
    title = f"{config.model.path}: {len(candidates)} linears, {samples} samples of {tokens:,} tokens, blocks of {size}"
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    console.table(title, COLUMNS, cells)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for module in candidates:
        by_kind[module.rpartition(".")[2]].append(module)
    shares = [
        [kind, *(f"{fmean(_shares(found[name], found[EXACT], modules)):.2f}" for name in structures)]
        for kind, modules in by_kind.items()
    ]
    console.table("By linear", ["linear", *structures], shares)
    return rows


def _settings(name: str, request: Request) -> FactorSettings:
    structure, _, rank = name.partition(":")
    asked = request.settings.statistics() | {"structure": structure}
    return FactorSettings(**asked | ({"rank": int(rank)} if rank else {}))


def _chosen(request: Request, scores: Mapping[str, Tensor]) -> dict[str, set[tuple[int, ...]]]:
    """The blocks of each linear that a selection by these scores trains."""
    settings = request.settings
    selection = choose(request.budget, scores, order=settings.order, allocation=settings.allocation, seed=settings.seed)
    return {name: {*map(tuple, kinds["blocks"].tolist())} for name, kinds in selection.modules.items()}


def _shares(
    found: Mapping[str, set[tuple[int, ...]]], exact: Mapping[str, set[tuple[int, ...]]], modules: Sequence[str]
) -> list[float]:
    return [len(found[name] & exact[name]) / len(exact[name]) for name in modules]


def _overlaps(
    found: Mapping[str, set[tuple[int, ...]]], exact: Mapping[str, set[tuple[int, ...]]]
) -> tuple[float, float]:
    """Mean and least over the linears."""
    shares = _shares(found, exact, list(exact))
    return fmean(shares), min(shares)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
