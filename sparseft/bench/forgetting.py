"""What finished runs have learnt and forgotten: each run's adapter loaded on the one base, and losses read with it.

The target's are read on the run's held-out examples, the source's on files that nothing is trained on, both split in
two by whole questions (`data/split.py`): validation, by which something may be chosen, and test, which is reported. A
held-out example is in the same one with each seed, but for those of a question that about half of all ask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseft import console
from sparseft.adapters.description import is_whole_model
from sparseft.adapters.lifecycle import detach, load_adapter
from sparseft.bench.trials import Trial
from sparseft.config import BUNDLED, DatasetConfig, RunConfig
from sparseft.data.loading import check_tokens, data_of, load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.reading import named_sources
from sparseft.data.sampling import seeded_first
from sparseft.data.sources import locate
from sparseft.data.split import halves
from sparseft.data.tokenized import TokenizedDataset
from sparseft.errors import UserError
from sparseft.evaluation.held_out import held_out_loss
from sparseft.files.atomic import write_json
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import load_model, load_tokenizer, resolve_device, vocabulary_rows
from sparseft.runs.folder import ADAPTER

VALIDATION, TEST = SPLITS = ("validation", "test")
TARGET = "target"
SOURCE_EXAMPLES = 256  # of each file, drawn by a fixed seed: a few ten thousand tokens tell a hundredth of a nat
Losses = dict[str, dict[str, float]]  # by split: of TARGET, and of each source by its path


@dataclass
class Examples:
    """What losses are read on, by split: the target's of each seed, and those of each source."""

    target: dict[int, dict[str, list[Any]]]
    source: dict[str, dict[str, list[Any]]]
    key: dict[int, dict[str, dict[str, str]]]  # by seed: which examples these are
    trained: dict[int, tuple[str, str]]  # by seed: the training data's fingerprint, and where they come from
    pad: int

    def first_alike(self, seeds: Sequence[int]) -> list[int]:
        """Of each seed the first one with the same examples: the base's losses on them are the same."""
        return [next(first for first in seeds if self.key[first] == self.key[seed]) for seed in seeds]

    def describe(self, seed: int) -> str:
        """What is read of one model, and the settings that make it less."""
        target = [row for rows in self.target[seed].values() for row in rows]
        source = [row for splits in self.source.values() for rows in splits.values() for row in rows]
        counts = (f"{len(rows):,} examples ({sum(len(row['input_ids']) for row in rows):,} tokens)"
                  for rows in (target, source))  # fmt: skip
        return (
            f"of each model the losses on {next(counts)} held out and {next(counts)} of bench.source are read; "
            "dataset.eval_fraction, or a smaller dataset.eval_path, makes them fewer"
        )

    def losses(self, model: Any, seed: int, device: Any) -> Losses:
        """Those of a loaded model."""
        return {
            split: {TARGET: held_out_loss(model, self.target[seed][split], self.pad, device)}
            | {path: held_out_loss(model, rows[split], self.pad, device) for path, rows in self.source.items()}
            for split in SPLITS
        }


def read_examples(runs: Sequence[RunConfig], sources: Sequence[str]) -> Examples:
    """The held-out examples of runs on one set of data, one a seed, and those of the source's files.

    UserError where there are too few of them, or where a source is what is trained on.
    """
    model, config = runs[0].model, runs[0]
    tokenizer, vocabulary = load_tokenizer(model), vocabulary_rows(load_model(model))
    target, source, of_source = {}, {}, {}
    for path in sources:
        settings = DatasetConfig(
            name="text", train_path=path, eval_fraction=0.5, too_long=config.dataset.too_long,
            chat_date=config.dataset.chat_date,
        )  # fmt: skip
        with console.quiet():
            data = load_datasets(
                settings, tokenizer, max_length=config.trainer.max_length, seed=0, bundled=False,
                cache_dir=config.cache_dir,
            )  # fmt: skip
        check_tokens(data, tokenizer, *vocabulary)
        parts = [None if half is None else drawn(half) for half in (data.train, data.eval)]
        source[path], of_source[path] = by_split(parts, f"bench.source: '{path}'")
    key, trained, bundled = {}, {}, model.path.startswith(BUNDLED)
    for run in runs:
        with console.quiet():
            data = data_of(run, tokenizer)
        for path in sources:
            if any(_files_of(path) & _files_of(each.path) for each in named_sources(run.dataset, bundled)):
                raise UserError(f"bench.source: '{path}' is what is trained on, so it cannot say what is forgotten.")
        held_out = data.eval_tokens
        if held_out is None:
            raise UserError("there are no held-out examples to read the target's loss on.")
        check_tokens(data, tokenizer, *vocabulary)
        in_test = halves(held_out)
        parts = [held_out.dataset.subset(np.flatnonzero(in_test == half)) for half in (False, True)]
        target[run.seed], of_target = by_split(parts, "the held-out examples")
        key[run.seed] = {TARGET: of_target, **of_source}
        trained[run.seed] = data.fingerprint, data.train_source
    return Examples(target, source, key, trained, padding_id(tokenizer, vocabulary[0]))


def _files_of(source: str) -> set[Path | str]:
    """The files that a path names, each in one spelling, else the path: of the hub, or a folder."""
    files = locate(source).files
    return {file.resolve() for file in files} if files else {source}


def drawn(examples: TokenizedDataset) -> TokenizedDataset:
    """Those of a half of a source that are read, in their order."""
    count = min(SOURCE_EXAMPLES // 2, len(examples))
    return examples.subset(sorted(seeded_first(count, len(examples), 0, "source")))


def by_split(parts: Sequence[TokenizedDataset | None], what: str) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The examples of validation and test, and their fingerprints. UserError where one is empty: `what` there is too
    little of."""
    known = {split: part for split, part in zip(SPLITS, parts, strict=True) if part is not None and len(part)}
    if len(known) < len(SPLITS):
        count = sum(map(len, known.values()))
        raise UserError(f"{what} are too few for a validation and a test split ({count}): give more of them.")
    return {split: list(part) for split, part in known.items()}, {s: part.fingerprint() for s, part in known.items()}


def read_each(
    config: RunConfig, runs: Sequence[tuple[Trial | None, Path]], key: Any, read: Callable[[Any], Any]
) -> Iterator[Any]:
    """What `read(model)` says of each run's model, one after the other on one base; None is the base itself.

    runs: each with the file that keeps what was read. key: what that depends on besides the run: a file with the same
    one is taken. Whole models are loaded by themselves.
    """
    base, device = None, resolve_device(config.hardware.device)
    for trial, kept in runs:
        if kept.is_file() and (there := read_json_object(kept)).get("key") == key:
            yield there["read"]
            continue
        folder = None if trial is None else Path(str(trial.config.output_dir)) / ADAPTER
        with console.quiet():
            if folder is not None and is_whole_model(folder):
                whole = dataclasses.replace(config.model, path=str(folder), revision=None)
                content = read(load_model(whole, device).eval())
            else:
                if base is None:
                    base = load_model(config.model, device).eval()
                if folder is None:
                    content = read(base)
                else:
                    model = load_adapter(base, folder).eval()
                    content = read(model)
                    base = detach(model)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"key": key, "read": content})
        yield read_json_object(kept)["read"]  # as a later call finds it
