"""One trimming of a run's adapter: what is read, measured, searched and written."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft import __version__, console
from sparseft.adapters.description import read_config
from sparseft.adapters.lifecycle import units as units_of
from sparseft.adapters.state import require_state
from sparseft.compose.run_config import from_dict
from sparseft.config import DatasetConfig, RunConfig
from sparseft.data.files import locate_file
from sparseft.data.loaded import LoadedData
from sparseft.data.loading import check_tokens, data_of, load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.errors import UserError
from sparseft.evaluation.held_out import mean_loss
from sparseft.evaluation.target import Target, data_format, find_target, load_target
from sparseft.files.atomic import explained, replaced_folder, write_json
from sparseft.files.hub import REPLACED
from sparseft.files.tensors import DESCRIPTIONS
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.loading import load_tokenizer, resolve_device, vocabulary_rows
from sparseft.runs import folder as runs
from sparseft.trim.measured import TOGETHER, Measured, difference
from sparseft.trim.search import ROUNDS, STEPS, search

CALIBRATION = ROUNDS * STEPS * TOGETHER  # examples that slopes are taken on, of target and source each
HELD_OUT = 128  # examples that a loss is measured on
LEAST = 1024  # tokens of source text that forgetting is measured on, at least
HALF = 0.5  # of the source text calibrates, the other half measures


@dataclass
class Trimming:
    """A run's adapter, and the budget that it is to be cut back to."""

    target: Target
    config: RunConfig  # the run's, on this machine
    budget: float
    source: str
    own_data: bool = True  # the data are those that the run was trained on, as its settings say

    @staticmethod
    def find(run: str | None, config: RunConfig, overrides: Sequence[str], budget: float, source: str) -> Trimming:
        """That of a finished run (None: the latest); refuses at once what cannot be trimmed.

        config: of this machine (its device, its caches). Overrides of the model, the data and the trainer win over what
        the run says.
        """
        check(budget, source)
        folder = runs.find_run(run, for_adapter=True) if run is not None else runs.latest_run()
        target = find_target(config, run=str(folder), adapter=None, base=False, overrides=overrides)
        own = from_dict(read_yaml_object(folder / runs.CONFIG))
        if target.adapter is None or not own.method.separable:
            raise UserError(f"the run {folder}: {inseparable(own.method_name)}")
        if own.by_preference:
            raise UserError(
                f"the run {folder}: objective={own.objective} learnt from preferences, and trimming keeps what lowers "
                "the loss of imitation."
            )
        keys = {word.lstrip("+~").partition("=")[0] for word in overrides}
        recorded = own.dataset, own.trainer.max_length
        own.dataset = config.dataset if "dataset" in keys else _changed(own.dataset, config.dataset, "dataset", keys)
        own.trainer = _changed(own.trainer, config.trainer, "trainer", keys)
        own.model, own.hardware, own.cache_dir = target.model, config.hardware, config.cache_dir
        return Trimming(target, own, budget, source, recorded == (own.dataset, own.trainer.max_length))

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model with its adapter cut back, and what was done to it and came of it."""
        started = time.monotonic()
        config = self.config
        tokenizer = load_tokenizer(config.model)
        general = source_data(config, self.source, tokenizer)
        data = data_of(config, tokenizer)
        if self.own_data and self.target.folder is not None:
            otherwise = "Give the data as they were, or others with dataset.train_path=FILE."
            runs.check_trained_on(self.target.folder, data.fingerprint, data.train_source, otherwise)
        model, _ = load_target(self.target, config)
        for each in (data, general):
            check_tokens(each, tokenizer, *vocabulary_rows(model))
        units = units_of(model)
        calibration, rows = of_target(data, config.seed)
        with console.working("measuring what the base and the adapter know"):
            measured = Measured(
                model, units, calibration,
                _some(general.train, CALIBRATION, config.seed), _some(general.eval, HELD_OUT, config.seed),
                pad=padding_id(tokenizer, vocabulary_rows(model)[0]), device=resolve_device(config.hardware.device),
                batch_size=config.hardware.at_once(config.trainer.batch_size),
                recomputed=config.checkpointing != "none",
            )  # fmt: skip
            nothing, whole = (torch.full((measured.count,), value, dtype=torch.float64) for value in (0.0, 1.0))
            before = measured.losses(whole, measured.held_out)
            of_base, as_trained = (mean_loss(measured.losses(each, rows)) for each in (nothing, whole))
        forgot = difference(measured.base, before)[0]
        console.log(f"trim: as trained it forgets {forgot:.4f} nats a token of {general.train_source}")
        factors, alike = whole, None
        if forgot > self.budget:
            with console.Progress(ROUNDS, "trim", unit="round") as progress:
                found = search(measured, measured.count, self.budget, progress.update)
            losses = [mean_loss(measured.losses(each, rows)) for each in (found.apart, found.alike)]
            factors = found.apart if losses[0] <= losses[1] else found.alike
            alike = {"factor": float(found.alike.max()), "target_loss": losses[1]}
        after = measured.losses(factors, measured.held_out)
        measured.apply(factors)
        forgets, error = difference(measured.base, after)
        outcome = {
            "budget": self.budget,
            "trimmed": forgot > self.budget,
            "source": {
                "file": self.source,
                "examples": len(measured.held_out),
                "tokens": sum(count for _, count in after),
                "loss_base": mean_loss(measured.base),
                "loss_before": mean_loss(before),
                "loss_after": mean_loss(after),
                "forgetting_before": forgot,
                "forgetting": forgets,
                "stderr": error,
            },
            "target": {
                "data": data.eval_source or f"{data.train_source} (training examples)",
                "examples": len(rows),
                "loss_base": of_base,
                "loss_before": as_trained,
                "loss_after": mean_loss(measured.losses(factors, rows)),
            },
            "one_factor": alike,
            "units": measured.count,
            "dropped": int((factors == 0).sum()),
            "mean_factor": float(factors.mean()),
            "mean_factors": {name: float(part.mean()) for name, part in measured.of_each(factors).items()},
            "seconds": time.monotonic() - started,
        }
        return model, outcome

    def write(self, model: nn.Module, outcome: dict[str, Any], out: Path) -> None:
        """Writes the adapter that `run` left on the model into the folder `out`, whole or not at all."""
        assert self.target.adapter is not None and self.target.told is not None
        content = read_config(self.target.adapter)
        state = require_state(model)
        state.base_model = str((content.get("sparseft") or content).get("base_model") or state.base_model)
        assert state.active is not None
        with (
            explained(f"the trimmed adapter {out}", lambda: None),
            replaced_folder(out, DESCRIPTIONS, REPLACED) as aside,
        ):
            state.kind.save(model, state, state.active, aside, None)
            note = {"sparseft": __version__, "of": self.target.what, "run": self._told()} | outcome
            write_json(aside / runs.TRIM, note)
            questions = self.target.told / runs.QUESTIONS
            if out != self.target.adapter and questions.is_file():
                shutil.copyfile(questions, aside / runs.QUESTIONS)

    def _told(self) -> dict[str, Any]:
        """Of the run's settings those by which an evaluation of the adapter alone asks as one of the run does."""
        assert self.target.told is not None
        own = from_dict(read_yaml_object(self.target.told / runs.CONFIG))
        model = dataclasses.asdict(own.model)
        return {
            "method": {"name": own.method_name},
            "model": {name: model[name] for name in ("tokenizer", "revision", "dtype", "quantize")},
            "dataset": {"format": data_format(self.target.told), "plain_chat": own.dataset.plain_chat},
        }

    def replace(self, model: nn.Module, outcome: dict[str, Any]) -> None:
        """Puts it into the run in place of the adapter as trained, which is kept beside it."""
        assert self.target.adapter is not None and self.target.folder is not None
        with replaced_folder(self.target.folder / runs.UNTRIMMED, DESCRIPTIONS, REPLACED) as aside:
            for file in self.target.adapter.iterdir():
                shutil.copyfile(file, aside / file.name)
        self.write(model, outcome, self.target.adapter)


def check(budget: float, source: str, key: str = "--source") -> None:
    """Refuses a budget that is none, and a file that is not there; `key` is how messages call it."""
    if not 0 < budget < float("inf"):
        raise UserError(f"--forget {budget:g}: expected nats a token above 0, such as 0.02.")
    locate_file(source, key=key)


def inseparable(method: str) -> str:
    """Why an adapter of `method` cannot be trimmed."""
    return (
        f"method {method} leaves no sum of parts that could be scaled one by one; sparse adapters and plain LoRA are "
        "such a sum."
    )


def source_data(config: RunConfig, source: str, tokenizer: Any, key: str = "--source") -> LoadedData:
    """The source text in the run's tokens and lengths, one half to calibrate (`train`), one to measure on (`eval`).

    UserError where that is too short to say anything.
    """
    data = load_datasets(
        DatasetConfig(name="source", train_path=source, eval_fraction=HALF), tokenizer,
        max_length=config.trainer.max_length, seed=config.seed, bundled=False, cache_dir=config.cache_dir,
    )  # fmt: skip
    tokens = 0 if data.eval is None else data.eval.num_labelled
    if tokens < LEAST:
        raise UserError(
            f"{key} {source} is too short: half of it, {tokens} tokens, is to measure forgetting on, and at least "
            f"{LEAST} are needed."
        )
    return data


def of_target(data: LoadedData, seed: int) -> tuple[list[Any], list[Any]]:
    """The target's examples that calibrate, and those that its loss is measured on: without evaluation examples other
    training examples, half of them where there are few; the same ones only where there is no second."""
    chosen = _some(data.train, CALIBRATION + HELD_OUT, seed)
    if data.eval is not None:
        return chosen[:CALIBRATION], _some(data.eval, HELD_OUT, seed)
    count = min(CALIBRATION, (len(data.train) + 1) // 2)
    return chosen[:count], chosen[count:] or chosen


def _changed(own: Any, given: Any, section: str, keys: set[str]) -> Any:
    """A run's settings of a section, with those of `given` that are among `keys`."""
    fields = [key.split(".")[1] for key in keys if key.startswith(f"{section}.")]
    return dataclasses.replace(own, **{field: getattr(given, field) for field in fields})


def _some(rows: Any, count: int, seed: int) -> list[Any]:
    """At most `count` examples, chosen by the seed."""
    return [rows[index] for index in seeded_first(min(count, len(rows)), len(rows), seed, "trimming")]
