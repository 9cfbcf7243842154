"""A `DatasetConfig` and a tokenizer to training and evaluation examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseft import console
from sparseft.config import BUNDLED, DatasetConfig, in_bundle
from sparseft.data.chat import Chats
from sparseft.data.encoding import Encoder, tokenize
from sparseft.data.formats import DETECTION_RECORDS, Converter, Plain, check_records, detect_format
from sparseft.data.oasst_trees import Trees
from sparseft.data.packing import PackedDataset
from sparseft.data.question_hashes import QuestionHashes
from sparseft.data.sampling import seeded_first
from sparseft.data.sources import Source, open_source
from sparseft.data.token_cache import Cache, Damaged, Writer, tokens_key
from sparseft.data.tokenized import TokenizedDataset, Tokens
from sparseft.errors import UserError, nearest

# What the package bundles for a family of data sets: training file, and an evaluation file where there is one.
BUNDLED_SETS = {
    "commonsense": "commonsense/train.json",
    "arithmetic": "arithmetic/train.json",
    "oasst1": "oasst1/train.jsonl",
    "text": "text/train.txt",
    "json": "commonsense/train.json",
}


@dataclass
class LoadedData:
    """What a `DatasetConfig` names, in tokens."""

    train: TokenizedDataset
    eval: TokenizedDataset | None  # None: no evaluation examples
    format: str  # given or detected
    train_source: str  # as the user or the config named it
    eval_source: str  # empty without evaluation examples
    fingerprint: str  # sha256 over the tokenised training examples, labels included
    dropped: int  # training and split-off examples left out as too long or without a token to learn
    cut: int  # of those kept, how many had their answer cut
    questions: QuestionHashes  # of the training examples
    eval_overlap: int  # questions of the evaluation examples that are training questions too, by their normalised text
    packed: PackedDataset | None = None  # the training examples, several a row, with `packing`
    notes: list[str] = field(default_factory=list)  # sentences to tell the user: format, counts, overlap
    warnings: list[str] = field(default_factory=list)  # such sentences that should worry them


def load_datasets(
    config: DatasetConfig,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    bundled: bool,
    cache_dir: str | Path,
) -> LoadedData:
    """Reads, converts, splits and tokenises what `config` names; its fields and `max_length` (tokens, at least 2) have
    been validated.

    Training examples come from `train_path`; else, with the bundled model (`bundled`), from the bundled set of the
    family `config.name`; else from `hub_path`. Evaluation examples come from `eval_path`; else from the bundled set's
    own evaluation file; else `eval_fraction` of the training records is split off by a permutation of `seed`: at
    least one where there are two, and never all. Where there is one record only (a long text), its pieces are split.
    `max_examples` cuts the training records before anything else.

    The tokens lie in files below `cache_dir`, which are mapped into memory and used again for the same data, tokenizer
    and settings: memory does not grow with the data, but for some 50 bytes an example.

    Raises UserError for a missing or broken file, a bad record, or if no example is left.
    """
    path, split, own_eval = _training_path(config, bundled)
    reader = _Reader(config, Encoder(tokenizer), max_length, Cache(cache_dir))

    source = open_source(path, split=split, key="dataset.train_path")
    format, train = reader.read(source, "training", config.max_examples)
    evaluation, eval_source, overlap = None, "", 0
    eval_path = config.eval_path or own_eval
    if eval_path:
        there = open_source(eval_path, split=None, key="dataset.eval_path")
        _, evaluation = reader.read(there, "evaluation", None)
        eval_source = there.name
    elif config.eval_fraction > 0:
        train, evaluation = split_off(train, config.eval_fraction, seed)
        if evaluation is None:
            reader.notes.append("a single example cannot be split: no evaluation examples")
        else:
            count = len(evaluation.dataset)
            eval_source = f"{source.name} ({count} {'example' if count == 1 else 'examples'} split off)"
    questions = QuestionHashes(train.questions)
    if evaluation is not None:
        eval_questions = np.unique(evaluation.questions)
        overlap = int(np.isin(eval_questions, questions.hashes).sum())
        # Held-out data that the user chose should share nothing; repeats within one file are just worth knowing.
        said = reader.warnings if eval_path else reader.notes
        said += _overlap(train.dataset, evaluation.dataset, overlap, len(eval_questions))
    if reader.encoder.eos is None:
        reader.notes.append("the tokenizer has no EOS token, so answers do not teach the model to stop")
    return LoadedData(
        train=train.dataset,
        eval=None if evaluation is None else evaluation.dataset,
        format=format,
        train_source=source.name,
        eval_source=eval_source,
        fingerprint=train.dataset.fingerprint(),
        dropped=train.facts.dropped,
        cut=train.facts.cut,
        questions=questions,
        eval_overlap=overlap,
        packed=PackedDataset(train.dataset, max_length) if config.packing else None,
        notes=reader.notes,
        warnings=reader.warnings,
    )


def check_tokens(data: LoadedData, tokenizer: Any, rows: int, logits: int) -> None:
    """Refuses examples with a token that the model does not have: one beyond the `rows` of its embeddings, or one to be
    learnt beyond its `logits`. That a tokenizer knows more tokens than occur in the data is no fault.
    """
    for part, source in ((data.train, data.train_source), (data.eval, data.eval_source)):
        for count, name, what in ((rows, "input_ids", "embeddings have"), (logits, "labels", "head has")):
            missing = part.beyond(count, name) if part is not None else []
            if missing:
                raise UserError(f"{source}: {no_row(missing[0], tokenizer, count, what)}")


def no_row(token: int, tokenizer: Any, rows: int, what: str = "embeddings have") -> str:
    """Says that `token` lies beyond the `rows` rows of a model's table, and what to do."""
    return (
        f"token '{tokenizer.convert_ids_to_tokens(token)}' has the id {token}, but the model's {what} {rows} rows "
        f"(ids 0 to {rows - 1}), of {len(tokenizer)} tokens that the tokenizer knows; use the model's own tokenizer, "
        f"or save the model after model.resize_token_embeddings({len(tokenizer)})."
    )


def _training_path(config: DatasetConfig, bundled: bool) -> tuple[str, str, str | None]:
    """Path, split (for a hub id) and, for a bundled set, its own evaluation file."""
    if config.train_path:
        return config.train_path, config.hub_split, None
    if bundled:
        if config.name not in BUNDLED_SETS:
            raise UserError(
                f"No data set is bundled for dataset '{config.name}'; give a file with dataset.train_path=FILE."
                f"{nearest(config.name, BUNDLED_SETS)}"
            )
        train = f"{BUNDLED}data/{BUNDLED_SETS[config.name]}"
        own_eval = train.replace("/train.", "/eval.")
        return train, config.hub_split, own_eval if in_bundle(own_eval) else None
    if config.hub_path:
        return config.hub_path, config.hub_split, None
    raise UserError(
        f"dataset '{config.name}' names no training data for this model; "
        "give a file or a hub id: dataset.train_path=FILE."
    )


class _Reader:
    """Sources to tokens, by one configuration; collects what there is to say about them."""

    def __init__(self, config: DatasetConfig, encoder: Encoder, max_length: int, cache: Cache) -> None:
        self.config, self.encoder, self.max_length, self.cache = config, encoder, max_length, cache
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def read(self, source: Source, role: str, count: int | None) -> tuple[str, Tokens]:
        """Format and tokens of the first `count` records of a source."""
        config = self.config
        detected = config.format == "auto"
        format = detect_format(source.first(DETECTION_RECORDS)) if detected else config.format
        if format != "messages" and config.plain_chat:
            raise UserError(
                f"dataset.plain_chat=true: applies to chats (format messages), but {source.name} has format {format}; "
                "leave it out."
            )
        if format != "oasst_trees" and (config.paths != "best" or config.language is not None):
            name = "paths" if config.paths != "best" else "language"
            raise UserError(
                f"dataset.{name}={getattr(config, name)}: applies to message trees (format oasst_trees), but "
                f"{source.name} has format {format}; leave it out."
            )
        tokens, cached = self._cached(source, format, role, count)
        facts = tokens.facts
        if role == "training":
            how = "detected" if detected else "as set"
            self.notes.append(f"{facts.records} training records from {source.name}, format {format} ({how})")
        self.notes += [note for note in facts.notes if note not in self.notes]
        limit = f"{self.max_length} tokens"
        if facts.dropped:
            self.notes.append(
                f"{facts.dropped} of {facts.examples} {role} examples dropped: no token to learn within {limit}"
            )
        if facts.cut:
            self.notes.append(f"{facts.cut} of {facts.examples} {role} examples had their answer cut at {limit}")
        if cached is not None:
            self.notes.append(f"{role} tokens: cached, {cached}")
        return format, tokens

    def _cached(self, source: Source, format: str, role: str, count: int | None) -> tuple[Tokens, Path | None]:
        """The tokens, and where they were found if they need not be made."""
        with console.working(f"reading {source.name}"):
            content = source.content()
        key = tokens_key(content, self.encoder.tokenizer, self._settings(format, count))
        try:
            tokens = self.cache.load(key)
        except Damaged as damage:
            self.warnings.append(f"the cached tokens are damaged and are made anew: {damage}")
            tokens = None
        if tokens is not None:
            self._refuse_mixed(tokens.facts.mixed)
            return tokens, self.cache.path(key)
        with self.cache.making(key) as writer:
            self._write(source, format, role, count, writer)
            if source.content() != content:
                raise UserError(f"{source.name} was changed while it was read; start again once it is complete.")
        tokens = self.cache.load(key)
        assert tokens is not None
        return tokens, None

    def _refuse_mixed(self, mixed: str | None) -> None:
        """A format that was set holds for all records; one that was detected is no reason to read others by it."""
        if mixed is not None and self.config.format == "auto":
            raise UserError(mixed)

    def _settings(self, format: str, count: int | None) -> dict[str, Any]:
        config = self.config
        names = ("too_long", "loss_on_prompt", "paths", "language", "plain_chat")
        return {"format": format, "max_length": self.max_length, "max_examples": count} | {
            name: getattr(config, name) for name in names
        }

    def _write(self, source: Source, format: str, role: str, count: int | None, writer: Writer) -> None:
        converter: Converter
        if format == "messages":
            converter = Chats(self.encoder, self.config.plain_chat)
        elif format == "oasst_trees":
            converter = Trees(self.config.paths, self.config.language)
        else:
            converter = Plain(format)
        with console.Progress(None, f"tokenising the {role} data", unit="record", keeps=False) as progress:
            for records in source.chunks(count):
                mixed = check_records(records, format)
                self._refuse_mixed(mixed)
                writer.facts.mixed = writer.facts.mixed or mixed
                examples = converter.convert(records)
                writer.facts.records += len(records)
                writer.add(
                    tokenize(
                        examples,
                        self.encoder,
                        max_length=self.max_length,
                        too_long=self.config.too_long,
                        loss_on_prompt=self.config.loss_on_prompt,
                        chunk=format == "text",
                    )
                )
                progress.update(writer.facts.records)
        note = converter.note(source.name)
        facts = writer.facts
        facts.notes += [note] if note else []
        if facts.examples == 0:
            raise UserError(f"{source.name}: none of the {facts.records} {role} records holds an example ({note}).")
        if facts.dropped == facts.examples:
            raise UserError(
                f"{source.name}: none of the {facts.examples} {role} examples fits trainer.max_length="
                f"{self.max_length} tokens with dataset.too_long={self.config.too_long}; allow more tokens."
            )


def split_off(tokens: Tokens, fraction: float, seed: int) -> tuple[Tokens, Tokens | None]:
    """What to train on and what to evaluate on: disjoint, together all, both in the order of the file.

    Examples of one record go to one side, so a conversation does not evaluate itself; with a single record the examples
    are split one by one. `fraction` is a share of the records in (0, 1), rounded, at least one and never all. The
    second is None if there is one example only.
    """
    names, groups = np.unique(tokens.records, return_inverse=True)
    if len(names) == 1:
        names = groups = np.arange(len(tokens.records))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    if count == 0:
        return tokens, None
    held_out = np.zeros(len(names), bool)
    held_out[seeded_first(count, len(names), seed, "evaluation")] = True
    held_out = held_out[groups]
    asked = np.isin(tokens.question_records, tokens.records[~held_out])  # in training
    return tokens.part(~held_out, asked), tokens.part(held_out, ~asked)


def _overlap(train: TokenizedDataset, evaluation: TokenizedDataset, questions: int, of: int) -> list[str]:
    """What evaluation and training examples have in common, as sentences."""
    wanted = list(evaluation.example_keys())
    there = set(wanted)
    seen = {key for key in train.example_keys() if key in there}
    shared = sum(key in seen for key in wanted)
    found = []
    if shared:
        found.append(f"{shared} of {len(evaluation)} evaluation examples are also training examples, token for token")
    if questions:
        found.append(f"{questions} of {of} questions of the evaluation examples are training questions too")
    return found
