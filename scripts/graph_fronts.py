#!/usr/bin/env python3
"""What small models learn and forget, many trainings in minutes: each one's passes are a CUDA graph, captured once.

    python scripts/front_tokens.py --model MODEL --data DATA --out tokens.npz
    python scripts/graph_fronts.py train --model MODEL --tokens tokens.npz --target oasst1 --out oasst1.jsonl
    python scripts/graph_fronts.py table oasst1.jsonl

`bench front` measures the same by ordinary runs, whose Python a small model on a GPU waits for. Here a step is: a batch
put in place, the graph replayed, gradients clipped at 1, the optimizer. Equal for all contenders: 80 steps of 8 rows,
the rate up over a tenth of the steps and down to zero, no decay, no dropout, one order of the data a seed; fp32,
products in TF32. Units chosen by gradient are chosen by the norms of eight training batches' gradients before the first
step, and where they are sampled anew by those of four others every fifth of the steps.

Rates that another one of their contender beats in target and source, both on the validation half, are
trained with no further seed. A line of JSON a training; a line of `base` comes first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from front_tokens import LENGTHS
from torch import Tensor
from torch.nn import functional as F

from sparseft import console
from sparseft.adapters.lifecycle import attach, trainable_count, trainable_parameters
from sparseft.bench.forgetting import SPLITS, TARGET, TEST, VALIDATION
from sparseft.bench.front import Measured, chosen, compare, drop_hopeless
from sparseft.data.tokenized import IGNORED
from sparseft.methods import get_method
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import as_trained, compute_selection
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.reselection.running import Running
from sparseft.training.reselection.swap import apply_selection

SOURCES = {"gsm8k": ("stories", "chat"), "commonsense": ("stories", "chat"), "oasst1": ("stories", "maths")}
STEPS, ROWS, CURVE = 80, 8, 5  # optimizer steps, rows of each, points of a curve
PARTS = 5  # of a training, after each of which sampled units are sampled anew
WARM = 5  # steps over which the rate climbs back then
BUDGET = 0.98275  # the share that stays frozen: as many weights as LoRA's rank 6 on all linears of SmolLM2-135M


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method with its settings and the rates to try."""

    method: str
    rates: tuple[float, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_gradient: str | None = None  # the order of units chosen by the gradients of training batches
    anew: bool = False  # and chosen anew on the way


BOTH = {"roles": ["o", "down"], "sparsity": BUDGET}
BLOCKS = {"block_size": 16, "sparsity": BUDGET}
LORA = {"sparsity": BUDGET, "dropout": 0.0}
CONTENDERS = {
    "LoRA": Contender("lora", (1e-3, 3e-3, 1e-2), LORA),
    "S2FT": Contender("s2ft", (3e-3, 1e-2, 3e-2), {"sparsity": BUDGET}),
    "S2FT of o and down, sampled": Contender("s2ft", (1e-3, 3e-3, 1e-2), BOTH, "sampled", anew=True),
    "S2FT of o and down by gradient": Contender("s2ft", (3e-4, 1e-3, 3e-3, 1e-2), BOTH, "largest"),
    "Sylva": Contender("sylva", (1e-3, 3e-3, 1e-2), {**BLOCKS, "num_samples": 32}),
    "full": Contender("full", (1e-4, 3e-4)),
    "Sylva by gradient": Contender("sylva", (1e-3, 3e-3, 1e-2), BLOCKS, "largest"),
    "Sylva, sampled": Contender("sylva", (1e-3, 3e-3, 1e-2), BLOCKS, "sampled", anew=True),
    "LoRA, rank 64": Contender("lora", (3e-4, 1e-3, 3e-3), {"rank": 64, "dropout": 0.0}),
    "DoRA": Contender("dora", (1e-3, 3e-3), LORA),
    "paca": Contender("paca", (3e-3, 1e-2), {"sparsity": BUDGET}),
}


# ---- rows ----

Row = tuple[Tensor, Tensor]  # token ids, labels


def rows_of(found: Any, name: str) -> list[Row]:
    """A set of the file of tokens."""
    ids = torch.from_numpy(found[f"{name}.ids"].astype(np.int64))
    labels = torch.where(torch.from_numpy(found[f"{name}.labelled"]), ids, IGNORED)
    lengths = found[f"{name}.lengths"].tolist()
    return list(zip(ids.split(lengths), labels.split(lengths), strict=True))


def padded(rows: list[Row], length: int) -> Row:
    """(rows, length), cut or padded on the right: what a causal model says of a row's own tokens is the same."""
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORED)
    for at, (own, wanted) in enumerate(rows):
        ids[at, : len(own)], labels[at, : len(own)] = own[:length], wanted[:length]
    return ids, labels


# ---- what a model knows ----


class Held:
    """Rows that losses are read on, in batches of similar length."""

    def __init__(self, rows: list[Row], device: torch.device, most: int) -> None:
        self.count, self.batches = len(rows), []
        order = sorted(range(len(rows)), key=lambda at: len(rows[at][0]))
        while order:
            few = [order.pop()]  # the longest that is left
            while order and len(rows[few[0]][0]) * (len(few) + 1) <= most:
                few.append(order.pop())
            ids, labels = padded([rows[at] for at in few], len(rows[few[0]][0]))
            self.batches.append((ids.to(device), labels.to(device), torch.tensor(few)))

    @torch.no_grad()
    def losses(self, model: Any) -> tuple[Tensor, Tensor]:
        """Of each row the sum over its labelled tokens, float64, and how many they are."""
        sums, counts = torch.zeros(self.count, dtype=torch.float64), torch.zeros(self.count, dtype=torch.float64)
        for ids, labels, few in self.batches:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            kept = labels[:, 1:] != IGNORED
            logits = model.lm_head(hidden[kept]).float()
            each = F.cross_entropy(logits, labels[:, 1:][kept], reduction="none").double()
            of = kept.nonzero()[:, 0]
            sums[few] = torch.zeros(len(few), dtype=torch.float64, device=each.device).index_add_(0, of, each).cpu()
            counts[few] = kept.sum(1).double().cpu()
        return sums, counts

    def mean(self, model: Any) -> float:
        """The mean over all labelled tokens."""
        sums, counts = self.losses(model)
        return float(sums.sum() / counts.sum())

    def accuracy(self, model: Any, of: np.ndarray) -> float:
        """The share of questions whose right answer has the lowest loss. of (questions, 2): how many answers each has,
        and which is right."""
        sums, _ = self.losses(model)
        answers = sums.split(of[:, 0].tolist())
        return float(np.mean([int(each.argmin()) == right for each, right in zip(answers, of[:, 1], strict=True)]))


# ---- training ----


class Study:
    """One target: the base, its tokens, and trainings."""

    def __init__(self, model: str, file: Path, target: str, device: torch.device) -> None:
        self.target, self.device, self.found = target, device, np.load(file)
        self.base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self.base.requires_grad_(False)
        self.spec, self.fingerprints = ModelSpec.of(self.base), base_fingerprints(self.base)
        self.train, self.length = rows_of(self.found, f"{target}.train"), LENGTHS[target]
        self.most = 16384 if device.type == "cuda" else 2048  # tokens at once, where nothing trains
        names = [f"{name}.{split}" for name in (target, *SOURCES[target]) for split in SPLITS]
        self.held = {name: self._held(rows_of(self.found, name)) for name in names}
        self.curve = self._held(rows_of(self.found, f"{target}.{TEST}")[:64])
        self.asked = {name: self._held(rows_of(self.found, name)) for name in self._questions}
        self.selections: dict[tuple[str, int], Any] = {}  # of contenders with a seed, at whatever rate
        # Given, so that no pass asks the device anything: such a pass could not be captured.
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril()
        self.fixed = {
            "attention_mask": causal[None, None].expand(ROWS, 1, -1, -1),
            "position_ids": torch.arange(self.length, device=device)[None],
        }

    @property
    def _questions(self) -> tuple[str, ...]:
        return ("piqa", "asked", "untouched") if self.target == "commonsense" else ("piqa",)

    def _held(self, rows: list[Row]) -> Held:
        return Held(rows, self.device, self.most)

    def measure(self, model: Any) -> dict[str, Any]:
        """Losses of target and sources on both halves, and accuracies."""
        return {
            "losses": {name: held.mean(model) for name, held in self.held.items()},
            "accuracies": {name: held.accuracy(model, self.found[f"{name}.of"]) for name, held in self.asked.items()},
        }

    def drawn(self, seed: int, count: int) -> Iterator[Row]:
        """`count` batches of training rows, in the seed's order, the set as often as it takes."""
        generator, order = torch.Generator().manual_seed(seed), []
        while len(order) < count * ROWS:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        for at in range(count):
            yield padded([self.train[number] for number in order[at * ROWS : (at + 1) * ROWS]], self.length)

    def calibration(self, seed: int, count: int) -> list[dict[str, Tensor]]:
        rows = [row for ids, labels in self.drawn(1000 + seed, -(-count // ROWS)) for row in zip(ids, labels)]  # noqa: B905
        return [
            {"input_ids": ids[None].to(self.device), "labels": labels[None].to(self.device)}
            for ids, labels in rows[:count]
        ]

    def run(self, name: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
        """One training: what came of it."""
        contender, began = CONTENDERS[name], time.perf_counter()
        torch.manual_seed(seed)
        training = Training(self, name, contender, rate, seed, steps)
        curve = training.all_steps()
        facts = {"contender": name, "rate": rate, "seed": seed, "trainable": training.trainable, "curve": curve,
                 "train_seconds": training.seconds, "choose_seconds": training.choosing}  # fmt: skip
        return facts | self.measure(training.model) | {"seconds": time.perf_counter() - began}


class Training:
    """A contender on a copy of the base, at one rate."""

    def __init__(self, study: Study, name: str, contender: Contender, rate: float, seed: int, steps: int) -> None:
        self.study, self.contender, self.rate, self.seed, self.steps = study, contender, rate, seed, steps
        self.seconds = self.choosing = 0.0
        self.device, self.cuda = study.device, study.device.type == "cuda"
        self.ids, self.labels = (torch.zeros(ROWS, study.length, dtype=torch.long, device=self.device) for _ in "12")
        model = copy.deepcopy(study.base)
        self._attach(model, name)
        self.graph: Any = None
        self.loss: Any = None

    def _attach(self, model: Any, name: str) -> None:
        contender, study = self.contender, self.study
        own = {} if contender.method == "full" else {"seed": self.seed}
        method: Any = get_method(contender.method)(**contender.settings, **own)
        kind: Callable[..., Any] = torch.optim.AdamW
        if method.trains_all:
            self.attached = model.requires_grad_(True)
        elif method.sparse:
            if contender.by_gradient:  # after attaching at random
                method = dataclasses.replace(method, importance="random")
            if (name, self.seed) not in study.selections:
                with self._choosing():
                    batches = study.calibration(self.seed, method.num_samples) if method.needs_data else None
                    study.selections[name, self.seed] = compute_selection(model, method, batches)
            selection = study.selections[name, self.seed]
            self.attached = attach(model, method, selection, spec=study.spec, fingerprints=study.fingerprints)
            kind = SparseAdamW
        else:
            self.attached = attach(model, method, spec=study.spec, fingerprints=study.fingerprints)
        self.method, self.model = method, getattr(self.attached, "get_base_model", lambda: self.attached)()
        self.trainable = trainable_count(self.attached) if not method.trains_all else sum(
            parameter.numel() for parameter in model.parameters())  # fmt: skip
        self.parameters = [p for p in self.attached.parameters() if p.requires_grad]
        taken = trainable_parameters(self.attached).values() if method.sparse else self.parameters
        fused = {"fused": True} if self.cuda and kind is not SparseAdamW else {}
        self.optimizer = kind(taken, lr=self.rate, weight_decay=0.0, **fused)

    def _choosing(self) -> Any:
        return _Clock(self, "choosing")

    def _place(self, batch: Row) -> None:
        self.ids.copy_(batch[0], non_blocking=True)
        self.labels.copy_(batch[1], non_blocking=True)

    def _passes(self) -> Tensor:
        logits = self.model(input_ids=self.ids, **self.study.fixed, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.labels[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _capture(self) -> None:
        """Gradients live where the graph writes them, so nothing clears them from here on."""
        self.graph = None
        self._clear()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._passes()
                self._clear()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._passes()

    def _choose(self, at: int, batches: int) -> None:
        """Takes what the gradients of training batches show, as `method.reselect_by=running` does."""
        with self._choosing():
            order = self.contender.by_gradient
            budget = as_trained(self.attached, self.method, spec=self.study.spec)
            running = Running(1, self.attached, self.study.spec, budget, order=order, seed=self.seed)
            self.graph = None
            for batch in self.study.drawn(1000 + self.seed + at, batches):
                self._place(batch)
                self._clear()
                running.look(0)
                self._passes()
                running.on_step_end(None, _BEFORE_THE_LAST, None)
            self._clear()
            apply_selection(self.attached, running.choose(at), self.optimizer)

    def all_steps(self) -> dict[int, float]:
        """Trains; returns losses on the curve's rows by step."""
        steps, anew, curve = self.steps, self.steps // PARTS, {}
        if self.contender.by_gradient:
            self._choose(0, 8)
        for step, batch in enumerate(self.study.drawn(self.seed, steps)):
            if step and step % anew == 0 and self.contender.anew:
                self._choose(step, 4)
            with _Clock(self, "seconds"):
                self._place(batch)
                if self.cuda and self.graph is None:
                    self._capture()
                if self.graph is None:
                    self._clear()
                    self._passes()
                else:
                    self.graph.replay()
                for group in self.optimizer.param_groups:
                    group["lr"] = self._rate(step, anew)
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
                self.optimizer.step()
            if (step + 1) % (steps // CURVE) == 0:
                curve[step + 1] = self.study.curve.mean(self.model)
        return curve

    def _rate(self, step: int, anew: int) -> float:
        warm = max(1, self.steps // 10)
        rate = self.rate * min((step + 1) / warm, (self.steps - step) / (self.steps - warm))
        since = step % anew
        return rate * (since + 1) / (WARM + 1) if self.contender.anew and step >= anew and since < WARM else rate


class _Clock:
    """Adds the seconds inside to one of a training's counts."""

    def __init__(self, training: Training, name: str) -> None:
        self.training, self.name = training, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.training.cuda:
            torch.cuda.synchronize()
        setattr(self.training, self.name, getattr(self.training, self.name) + time.perf_counter() - self.start)


_BEFORE_THE_LAST = transformers.TrainerState(global_step=1, max_steps=1)  # a step after which nothing is chosen


def train(options: argparse.Namespace) -> None:
    """All contenders at all rates, seed after seed, until the time is over."""
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    study = Study(options.model, options.tokens, options.target, device)
    names = options.only or list(CONTENDERS)
    points = {name: {rate: Measured(rate) for rate in CONTENDERS[name].rates} for name in names}

    def keep(line: dict[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        console.log(f"{line['contender']} {line.get('rate', '')} seed {line.get('seed', '')}: "
                    f"{line['losses'][f'{options.target}.{VALIDATION}']:.4f}")  # fmt: skip

    of_base = study.measure(study.base)
    keep({"contender": "base", "target": options.target, **of_base})
    for seed in range(options.seeds):
        for name in names:
            for rate, point in points[name].items():
                if point.dropped:
                    continue
                if time.perf_counter() - began > options.seconds:
                    console.log("the time is over")
                    return
                with console.quiet():
                    line = study.run(name, rate, seed, options.steps)
                keep(line)
                point.add(_by_split(line["losses"], options.target), _by_split(of_base["losses"], options.target))
            drop_hopeless(list(points[name].values()), seed + 1)


def _by_split(losses: dict[str, float], target: str) -> dict[str, dict[str, float]]:
    own = {split: {name: losses[f"{name}.{split}"] for name in SOURCES[target]} for split in SPLITS}
    return {split: {TARGET: losses[f"{target}.{split}"], **own[split]} for split in SPLITS}


# ---- tables ----


def table(path: Path, levels: list[float]) -> str:
    """Of each contender with three seeds at one rate or more: what it learnt and forgot, and how it compares with the
    first at equal forgetting, on the test half."""
    base, *lines = (json.loads(line) for line in path.open())
    target, of_base = base["target"], _by_split(base["losses"], base["target"])
    seeds = sorted({line["seed"] for line in lines})
    variants: dict[str, Any] = {}
    for name in dict.fromkeys(line["contender"] for line in lines):
        points = []
        for rate in sorted({line["rate"] for line in lines if line["contender"] == name}):
            own = [line for line in lines if line["contender"] == name and line["rate"] == rate]
            point = Measured(rate, rate, None if len(own) == len(seeds) else len(own))
            for line in sorted(own, key=lambda line: line["seed"]):
                point.add(_by_split(line["losses"], target), of_base)
            points.append(point)
        if not all(point.dropped for point in points):
            variants[name] = {"trainable_parameters": own[0]["trainable"], **chosen(points)}
    compare({"seeds": seeds, "levels": levels, "variants": variants})
    found = [f"{target}: {len(seeds)} seeds; the base's loss {of_base[TEST][TARGET]:.4f}", ""]
    for name, entry in variants.items():
        found.append(f"{name} ({entry['trainable_parameters']:,} weights), chosen rate {entry['rate']:g}")
        for point in entry["points"]:
            means = [f"{np.mean(point[key]):.4f}" for key in ("target", "forgetting")]
            note = "" if point["dropped"] is None else f", {point['dropped']} seeds"
            found.append(f"  at {point['learning_rate']:g}: target {means[0]}, forgotten {means[1]}{note}")
        for row in entry["at"]:
            level = "the first's own" if row["forgetting"] is None else f"{row['forgetting']:g}"
            given = ""
            if "interval" in row:
                low, high = row["interval"]
                given = f"{np.mean(row['differences']):+.4f} [{low:+.4f}, {high:+.4f}] "
            found.append(f"  at {level} forgotten: {given}{row['verdict']}")
    return "\n".join(found)


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("--model", required=True)
    verb.add_argument("--tokens", type=Path, required=True)
    verb.add_argument("--target", choices=list(LENGTHS), required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--seconds", type=float, default=3600.0, help="after which no training begins")
    verb.add_argument("--seeds", type=int, default=3)
    verb.add_argument("--steps", type=int, default=STEPS)
    verb.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    verb = verbs.add_parser("table")
    verb.add_argument("runs", type=Path)
    verb.add_argument("--levels", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2])
    options = parser.parse_args(arguments)
    if options.verb == "train":
        if options.out.exists():
            parser.error(
                f"--out {options.out} exists already: expected a new file, as a base and its runs are one file."
            )
        train(options)
    else:
        print(table(options.runs, options.levels))


if __name__ == "__main__":
    main(sys.argv[1:])
