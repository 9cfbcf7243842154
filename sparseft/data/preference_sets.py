"""A `DatasetConfig` and a tokenizer to what is better and what is worse, for the preference objectives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from sparseft.config import DatasetConfig
from sparseft.data.encoding import Encoder
from sparseft.data.formats import DETECTION_RECORDS
from sparseft.data.loaded import LoadedData, Preferences, overlap_sentences
from sparseft.data.preferences import PREFERENCE, SIDES, UNPAIRED, written_as
from sparseft.data.question_hashes import QuestionHashes
from sparseft.data.reading import NamedSource, Opened, Reader, named_sources
from sparseft.data.split import held_out_of
from sparseft.data.token_cache import Cache
from sparseft.data.tokenized import Tokens
from sparseft.errors import UserError

UNPAIRS = "kto"  # the objective that takes each answer for itself, those of pairs too


def load_preferences(
    config: DatasetConfig,
    tokenizer: Any,
    *,
    objective: str,
    max_length: int,
    seed: int,
    bundled: bool,
    cache_dir: str | Path,
) -> LoadedData:
    """Reads, converts, splits and tokenises the pairs or answers that `config` names, as `load_datasets` does examples.

    A pair of which one answer has no token within `max_length` is left out. Raises UserError as `load_datasets` does,
    and where answers for themselves are given to an objective that compares two.
    """
    reader = Reader(config, Encoder(tokenizer), max_length, Cache(cache_dir))
    named = named_sources(config, bundled)[0]  # `compose` refuses mixes
    opened = reader.open(named, "training", seed, preferences=True)
    own = config.eval_path or named.own_eval
    held = None if own is None else reader.open(NamedSource(own, "dataset.eval_path"), "evaluation", seed, True)
    paired = objective != UNPAIRS
    for each in (opened, held):
        if each is not None and paired:
            _check_paired(each, objective)
    reader.check([opened, *([held] if held else [])])
    sides = _read(reader, opened, "training", config.max_examples)
    names = np.unique(np.concatenate([tokens.records for tokens in sides]))
    asked = None if held is None else _read(reader, held, "evaluation", None)
    source = held.source.name if held is not None else ""
    if held is None and config.eval_fraction > 0 and len(names) > 1:
        apart = names[held_out_of(names, *_asked(sides), config.eval_fraction, seed)]
        asked = [_those_of(tokens, apart) for tokens in sides]
        sides = [_those_of(tokens, np.setdiff1d(names, apart)) for tokens in sides]
        source = f"{opened.source.name} ({len(apart)} {'record' if len(apart) == 1 else 'records'} split off)"
    better, worse = sides
    if not len(better.dataset) or not len(worse.dataset):
        missing, there = ("false", "good") if len(better.dataset) else ("true", "bad")
        raise UserError(f"{opened.source.name}: all answers are {there} ones (no label is {missing}); expected both.")
    questions, overlap = QuestionHashes(_questions(sides)), 0
    if asked is not None:
        of_eval = np.unique(_questions(asked))
        overlap = int(np.isin(of_eval, questions.hashes).sum())
        said = reader.notes if held is None else reader.warnings
        said += overlap_sentences(better.dataset, asked[0].dataset, overlap, len(of_eval))
    together = hashlib.sha256(" ".join(tokens.dataset.fingerprint() for tokens in sides).encode()).hexdigest()
    return LoadedData(
        train=better.dataset,
        eval=None if asked is None else asked[0].dataset,
        format=written_as(opened.source.first(DETECTION_RECORDS)),
        formats=[opened.format],
        train_source=opened.source.name,
        sources=[opened.source.name],
        eval_source=source,
        fingerprint=together,
        dropped=sum(tokens.facts.dropped for tokens in sides),
        cut=sum(tokens.facts.cut for tokens in sides),
        questions=questions,
        eval_tokens=None if asked is None else asked[0],
        eval_overlap=overlap,
        preferences=Preferences(paired, better.dataset, worse.dataset),
        eval_preferences=None if asked is None else _held_out(paired, asked, of_file=held is not None),
        notes=reader.notes,
        warnings=reader.warnings,
    )


def load_pairs(
    config: DatasetConfig, tokenizer: Any, *, objective: str, max_length: int, seed: int, cache_dir: str | Path
) -> LoadedData:
    """The pairs of `eval_path` alone, as what is trained on and what is held out."""
    assert config.eval_path is not None
    reader = Reader(config, Encoder(tokenizer), max_length, Cache(cache_dir))
    opened = reader.open(NamedSource(config.eval_path, "dataset.eval_path"), "evaluation", seed, True)
    _check_paired(opened, objective)
    reader.check([opened])
    sides = _read(reader, opened, "evaluation", None)
    both = _held_out(True, sides, of_file=True)
    return LoadedData(
        train=both.better,
        eval=both.better,
        format=written_as(opened.source.first(DETECTION_RECORDS)),
        train_source=opened.source.name,
        eval_source=opened.source.name,
        fingerprint=both.better.fingerprint(),
        dropped=0,
        cut=0,
        questions=QuestionHashes(_questions(sides)),
        eval_tokens=sides[0],
        eval_overlap=0,
        preferences=both,
        eval_preferences=both,
        notes=reader.notes,
        warnings=reader.warnings,
    )


def _held_out(paired: bool, sides: list[Tokens], of_file: bool) -> Preferences:
    """What is evaluated on; of_file: all of a file, so that what is missing of its pairs was left out."""
    read = sides[0].facts.records if paired and of_file else 0
    return Preferences(paired, *(tokens.dataset for tokens in sides), left_out=max(0, read - len(sides[0].dataset)))


class Unpaired(UserError):
    """Data of one answer a prompt, where two are compared; `source` names them."""

    source: str


def _check_paired(opened: Opened, objective: str) -> None:
    if opened.format == UNPAIRED:
        error = Unpaired(
            f"objective={objective}: {opened.source.name} has one answer a prompt (prompt, completion, label), and "
            f"{objective} compares two (prompt, chosen, rejected); objective={UNPAIRS} takes them."
        )
        error.source = opened.source.name
        raise error


def _asked(sides: list[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """The questions of both sides, and the record of each."""
    return _questions(sides), np.concatenate([tokens.question_records for tokens in sides])


def _questions(sides: list[Tokens]) -> np.ndarray:
    return np.concatenate([tokens.questions for tokens in sides])


def _read(reader: Reader, opened: Opened, role: str, count: int | None) -> list[Tokens]:
    """Both sides; of pairs those records alone that have both."""
    both = [reader.read(opened, role, count, side).tokens for side in SIDES]
    if opened.format != PREFERENCE:
        return both
    complete = np.intersect1d(*(tokens.records for tokens in both))
    most = max(len(tokens.records) for tokens in both)
    if len(complete) < most:
        reader.notes.append(f"{most - len(complete)} of {most} {role} pairs left out: one of the answers fell away")
    if not len(complete):
        raise UserError(
            f"{opened.source.name}: no pair of which both answers fit trainer.max_length={reader.max_length}."
        )
    return [_those_of(tokens, complete) for tokens in both]


def _those_of(tokens: Tokens, records: np.ndarray) -> Tokens:
    return tokens.part(np.isin(tokens.records, records), np.isin(tokens.question_records, records))
