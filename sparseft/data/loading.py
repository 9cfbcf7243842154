"""A `DatasetConfig` and a tokenizer to training and evaluation examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseft.config import BUNDLED, DatasetConfig, RunConfig
from sparseft.data.encoding import Encoder
from sparseft.data.loaded import LoadedData, overlap_sentences
from sparseft.data.mixing import Taken, counts, drawn, replayed, take
from sparseft.data.packing import PackedDataset
from sparseft.data.preference_sets import load_preferences
from sparseft.data.question_hashes import QuestionHashes
from sparseft.data.reading import NamedSource, Opened, Part, Reader, named_sources
from sparseft.data.split import kept_apart, split_off
from sparseft.data.token_cache import Cache
from sparseft.data.tokenized import Tokens
from sparseft.errors import UserError

MOST_REPEATS = 1000  # of an example in an epoch


def data_of(config: RunConfig, tokenizer: Any) -> LoadedData:
    """What a run trains on and is evaluated on (`load_datasets`, `load_preferences`)."""
    settings: dict[str, Any] = {
        "max_length": config.trainer.max_length,
        "seed": config.seed,
        "bundled": config.model.path.startswith(BUNDLED),
        "cache_dir": config.cache_dir,
    }
    if config.by_preference:
        return load_preferences(config.dataset, tokenizer, objective=config.objective, **settings)
    return load_datasets(config.dataset, tokenizer, **settings)


def load_datasets(
    config: DatasetConfig,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    bundled: bool,
    cache_dir: str | Path = RunConfig.cache_dir,
) -> LoadedData:
    """Reads, converts, splits and tokenises what `config` names; its fields and `max_length` (tokens, at least 2) have
    been validated.

    Training examples come from `mix` or `train_path`; else, with the bundled model (`bundled`), from the bundled set of
    the family `config.name`; else from `hub_path`. What `replay` names comes on top. Evaluation examples come from
    `eval_path`; else from the bundled set's own evaluation file; else `eval_fraction` of the training records is split
    off, of each source but a replayed one, by a permutation of `seed`: at least one where there are two, and never all.
    A text that is more than half of all is split in its pieces; what is split off is so by whole questions (split.py),
    which no other source trains either.
    `max_examples` cuts the training records of each source before anything else.

    The tokens lie in files below `cache_dir`, which are mapped into memory and used again for the same data, tokenizer
    and settings: memory does not grow with the data, but for some 200 bytes an example.

    Raises UserError for a missing or broken file, a bad record, or if no example is left.
    """
    cache = Cache(cache_dir)
    reader = Reader(config, Encoder(tokenizer), max_length, cache)
    opened = [reader.open(each, "training", seed) for each in named_sources(config, bundled)]
    own = [NamedSource(each.named.own_eval, "dataset.eval_path") for each in opened if each.named.own_eval]
    apart = [NamedSource(config.eval_path, "dataset.eval_path")] if config.eval_path else own
    held = [reader.open(each, "evaluation", seed) for each in apart]
    _check_distinct(opened)
    reader.check([*opened, *held])
    parts = [reader.read(each, "training", config.max_examples) for each in opened]
    held_parts = [reader.read(each, "evaluation", None) for each in held]
    pieces = [(part.key, part.tokens) for part in (*parts, *held_parts)]
    trained, split = _split(parts, config, seed, reader.notes)
    evaluated = [_all_of(len(parts) + at, part.tokens) for at, part in enumerate(held_parts)] + split
    sources = [part.name for part in held_parts]
    for each in split:
        number = len(each.examples)
        sources.append(f"{parts[each.piece].name} ({number} {'example' if number == 1 else 'examples'} split off)")
    if len(parts) > 1:
        trained = _shared(parts, trained, config, seed, reader.notes, reader.warnings)
    train = take(pieces[: len(parts)], trained, cache)
    evaluation, eval_source, overlap = None, " + ".join(sources), 0
    if evaluated:
        evaluation = take(pieces if held_parts else pieces[: len(parts)], evaluated, cache)
    elif config.eval_fraction > 0:
        reader.notes.append("a single example cannot be split: no evaluation examples")
    questions = QuestionHashes(train.questions)
    if evaluation is not None:
        eval_questions = np.unique(evaluation.questions)
        overlap = int(np.isin(eval_questions, questions.hashes).sum())
        # Held-out data should share nothing with other files; repeats within one file are just worth knowing.
        said = reader.warnings if held_parts or len(parts) > 1 else reader.notes
        said += overlap_sentences(train.dataset, evaluation.dataset, overlap, len(eval_questions))
    if reader.encoder.eos is None:
        reader.notes.append("the tokenizer has no EOS token, so answers do not teach the model to stop")
    return LoadedData(
        train=train.dataset,
        eval=None if evaluation is None else evaluation.dataset,
        formats=list(dict.fromkeys(part.format for part in parts)),
        format=parts[max(trained, key=lambda each: len(each.examples)).piece].format,
        train_source=" + ".join(part.name for part in parts),
        sources=[part.name for part in parts],
        eval_source=eval_source,
        fingerprint=train.dataset.fingerprint(),
        dropped=train.facts.dropped,
        cut=train.facts.cut,
        questions=questions,
        eval_tokens=evaluation,
        eval_overlap=overlap,
        packed=PackedDataset(train.dataset, max_length) if config.packing else None,
        notes=reader.notes,
        warnings=reader.warnings,
    )


def check_tokens(data: LoadedData, tokenizer: Any, rows: int, logits: int) -> None:
    """Refuses examples with a token that the model does not have: one beyond the `rows` of its embeddings, or one to be
    learnt beyond its `logits`. That a tokenizer knows more tokens than occur in the data is no fault.
    """
    for part, source in data.parts():
        for count, name, what in ((rows, "input_ids", "embeddings have"), (logits, "labels", "head has")):
            missing = part.beyond(count, name)
            if missing:
                raise UserError(f"{source}: {no_row(missing[0], tokenizer, count, what)}")


def no_row(token: int, tokenizer: Any, rows: int, what: str = "embeddings have") -> str:
    """Says that `token` lies beyond the `rows` rows of a model's table, and what to do."""
    return (
        f"token '{tokenizer.convert_ids_to_tokens(token)}' has the id {token}, but the model's {what} {rows} rows "
        f"(ids 0 to {rows - 1}), of {len(tokenizer)} tokens that the tokenizer knows; use the model's own tokenizer, "
        f"or save the model after model.resize_token_embeddings({len(tokenizer)})."
    )


def _check_distinct(opened: list[Opened]) -> None:
    """Refuses data that are named twice, by whatever names."""
    for at, each in enumerate(opened):
        for other in opened[:at]:
            same = sorted(set(each.source.files) & set(other.source.files))
            sizes = [sum(file.stat().st_size for file in one.source.files) for one in (each, other)]
            if same or (sizes[0] == sizes[1] and each.source.content() == other.source.content()):
                if each.named.replay is not None:
                    raise UserError(f"dataset.replay: '{each.named.path}' is what is trained on anyway.")
                what = f"both read {same[0]}" if same else "hold the same data"
                raise UserError(f"{each.named.key}: '{other.named.path}' and '{each.named.path}' {what}.")


def _all_of(piece: int, tokens: Tokens) -> Taken:
    return Taken(piece, np.arange(len(tokens.dataset)), np.ones(len(tokens.questions), bool))


def _split(parts: list[Part], config: DatasetConfig, seed: int, notes: list[str]) -> tuple[list[Taken], list[Taken]]:
    """What of each part is trained on, and what of them is split off to evaluate on."""
    trained, split = [], []
    for at, part in enumerate(parts):
        whole = _all_of(at, part.tokens)
        apart = config.eval_path or part.source.own_eval or part.source.replay is not None
        both = None
        if config.eval_fraction and not apart:
            both = split_off(part.tokens, config.eval_fraction, seed, texts=part.format == "text")
        if both is None:
            trained.append(whole)
            continue
        held_out, asked = both
        trained.append(Taken(at, np.flatnonzero(~held_out), asked))
        split.append(Taken(at, np.flatnonzero(held_out), ~asked))
    return _without_held_out(parts, trained, split, notes), split


def _without_held_out(parts: list[Part], trained: list[Taken], split: list[Taken], notes: list[str]) -> list[Taken]:
    """What is trained on, less the examples that ask what another part holds out."""
    if len(parts) == 1 or not split:
        return trained
    out = {each.piece: each.examples for each in split}
    held_out = [out.get(at, np.empty(0, np.int64)) for at in range(len(parts))]
    kept = kept_apart([part.tokens for part in parts], [each.examples for each in trained], held_out)
    for part, mask in zip(parts, kept, strict=True):
        if not mask.any():
            raise UserError(
                f"{part.source.key}: all examples of {part.name} ask questions that are held out to evaluate on, so "
                "none is left to train on; name an evaluation file with dataset.eval_path=FILE, or leave this one out."
            )
        if not mask.all():
            notes.append(
                f"{len(mask) - mask.sum()} of {len(mask)} examples of {part.name} left out of training: they ask what "
                "is held out of another set"
            )
    return [_those_of(each, each.examples[mask], parts) for each, mask in zip(trained, kept, strict=True)]


def _those_of(each: Taken, examples: np.ndarray, parts: list[Part]) -> Taken:
    """So many of its examples, with the questions that their records ask."""
    tokens = parts[each.piece].tokens
    asked = each.questions & np.isin(tokens.question_records, tokens.records[examples])
    return replace(each, examples=examples, questions=asked)


def _shared(
    parts: list[Part], trained: list[Taken], config: DatasetConfig, seed: int, notes: list[str], warnings: list[str]
) -> list[Taken]:
    """The training examples of all sources in their shares, by a choice that `seed` makes."""
    sizes = [len(each.examples) for each in trained]
    new = [at for at, part in enumerate(parts) if part.source.replay is None]
    weights = [weight for at in new if (weight := parts[at].source.weight) is not None]
    wanted = counts([sizes[at] for at in new], weights or None, config.stopping)
    wanted += [replayed(sum(wanted), part.source.replay) for part in parts if part.source.replay is not None]
    for part, size, count in zip(parts, sizes, wanted, strict=True):
        if count > MOST_REPEATS * size:
            raise UserError(
                f"{part.source.key}: {part.name} has {size} examples and would be repeated {count // size:,} "
                "times for its share: give it a smaller one, or the others larger ones."
            )
    chosen = [
        _those_of(each, each.examples[drawn(count, size, seed, f"mix {part.source.path}")], parts)
        for part, each, size, count in zip(parts, trained, sizes, wanted, strict=True)
    ]
    learnt = [part.tokens.dataset.subset(each.examples).num_labelled for part, each in zip(parts, chosen, strict=True)]
    _say_shares(parts, sizes, wanted, learnt, notes, warnings)
    return chosen


def _say_shares(
    parts: list[Part], sizes: list[int], wanted: list[int], learnt: list[int], notes: list[str], warnings: list[str]
) -> None:
    """What an epoch has of each source: of the examples and of the tokens that are learnt, which may differ much."""
    total, all_learnt = sum(wanted), sum(learnt)
    for part, size, count, tokens in zip(parts, sizes, wanted, learnt, strict=True):
        share, of_tokens = count / total, tokens / all_learnt
        replay = " replayed" if part.source.replay is not None else ""
        notes.append(
            f"mix: {share:.1%}{replay} from {part.name}, {of_tokens:.1%} of the learnt tokens: {count} examples an "
            f"epoch, of {size}"
        )
        if part.source.replay is not None and of_tokens > 2 * share:
            warnings.append(
                f"dataset.replay: {part.name} is {share:.0%} of the examples but {of_tokens:.0%} of the tokens that "
                "are learnt, as its examples are longer: give it a smaller share"
            )
