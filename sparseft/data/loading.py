"""A `DatasetConfig` and a tokenizer to training and evaluation examples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseft import console
from sparseft.config import BUNDLED, DatasetConfig, RunConfig, in_bundle
from sparseft.data.chat import Chats
from sparseft.data.encoding import Encoder, tokenize
from sparseft.data.formats import DETECTION_RECORDS, Converter, Plain, check_records, detect_format
from sparseft.data.mixing import Taken, counts, drawn, parse_mix, parse_replay, replayed, take
from sparseft.data.oasst_trees import Trees
from sparseft.data.packing import PackedDataset
from sparseft.data.question_hashes import QuestionHashes
from sparseft.data.records import Source
from sparseft.data.sampling import seeded_first
from sparseft.data.sources import open_source
from sparseft.data.token_cache import Cache, Damaged, Writer, tokens_key
from sparseft.data.tokenized import TokenizedDataset, Tokens
from sparseft.errors import UserError, nearest

MOST_REPEATS = 1000  # of an example in an epoch

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
    format: str  # given or detected; of several sets that of the largest part
    train_source: str  # as the user or the config named it
    eval_source: str  # empty without evaluation examples
    fingerprint: str  # sha256 over the tokenised training examples, labels included
    dropped: int  # training and split-off examples left out as too long or without a token to learn
    cut: int  # of those kept, how many had their answer cut
    questions: QuestionHashes  # of the training examples
    eval_overlap: int  # questions of the evaluation examples that are training questions too, by their normalised text
    formats: list[str] = field(default_factory=list)  # of all sets, each once
    packed: PackedDataset | None = None  # the training examples, several a row, with `packing`
    notes: list[str] = field(default_factory=list)  # sentences to tell the user: format, counts, overlap
    warnings: list[str] = field(default_factory=list)  # such sentences that should worry them

    def tell(self) -> None:
        """Says the notes and the warnings."""
        for note in self.notes:
            console.log(f"data: {note}")
        for warning in self.warnings:
            console.warn(f"data: {warning}")


def data_of(config: RunConfig, tokenizer: Any) -> LoadedData:
    """What a run trains on and is evaluated on (`load_datasets`)."""
    return load_datasets(
        config.dataset, tokenizer, max_length=config.trainer.max_length, seed=config.seed,
        bundled=config.model.path.startswith(BUNDLED), cache_dir=config.cache_dir,
    )  # fmt: skip


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

    Training examples come from `mix` or `train_path`; else, with the bundled model (`bundled`), from the bundled set of
    the family `config.name`; else from `hub_path`. What `replay` names comes on top. Evaluation examples come from
    `eval_path`; else from the bundled set's own evaluation file; else `eval_fraction` of the training records is split
    off, of each source but a replayed one, by a permutation of `seed`: at least one where there are two, and never all.
    Where there is one record only (a long text), its pieces are split.
    `max_examples` cuts the training records of each source before anything else.

    The tokens lie in files below `cache_dir`, which are mapped into memory and used again for the same data, tokenizer
    and settings: memory does not grow with the data, but for some 50 bytes an example.

    Raises UserError for a missing or broken file, a bad record, or if no example is left.
    """
    cache = Cache(cache_dir)
    reader = _Reader(config, Encoder(tokenizer), max_length, cache)
    opened = [reader.open(each, "training", seed) for each in named_sources(config, bundled)]
    own = [NamedSource(each.named.own_eval, "dataset.eval_path") for each in opened if each.named.own_eval]
    apart = [NamedSource(config.eval_path, "dataset.eval_path")] if config.eval_path else own
    held = [reader.open(each, "evaluation", seed) for each in apart]
    _check_distinct(opened)
    reader.check([*opened, *held])
    parts = [reader.read(each, "training", config.max_examples) for each in opened]
    held_parts = [reader.read(each, "evaluation", None) for each in held]
    pieces = [(part.key, part.tokens) for part in (*parts, *held_parts)]
    trained, split = _split(parts, config, seed)
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
        said += _overlap(train.dataset, evaluation.dataset, overlap, len(eval_questions))
    if reader.encoder.eos is None:
        reader.notes.append("the tokenizer has no EOS token, so answers do not teach the model to stop")
    return LoadedData(
        train=train.dataset,
        eval=None if evaluation is None else evaluation.dataset,
        formats=list(dict.fromkeys(part.format for part in parts)),
        format=parts[max(trained, key=lambda each: len(each.examples)).piece].format,
        train_source=" + ".join(part.name for part in parts),
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


@dataclass(frozen=True)
class NamedSource:
    """Training data that a configuration names."""

    path: str  # a file, a hub id, or a bundled one
    key: str  # the setting that names it
    own_eval: str | None = None  # the evaluation file of a bundled set
    weight: float | None = None  # its share in a mix, before shares add up to 1; None: all of it
    replay: float | None = None  # its share of all, where it is old data


def named_sources(config: DatasetConfig, bundled: bool) -> list[NamedSource]:
    """The sources of the training data, those to replay last."""
    if config.mix is not None:
        if config.train_path:
            raise UserError("dataset.mix and dataset.train_path both name training data: give one of them.")
        found = [_named_source(share.path, "dataset.mix", bundled, share.weight) for share in parse_mix(config.mix)]
    elif config.train_path:
        found = [NamedSource(config.train_path, "dataset.train_path")]
    elif bundled or not config.hub_path:
        found = [_named_source(config.name, "dataset.train_path", bundled)]
    else:
        found = [NamedSource(config.hub_path, "dataset.train_path")]
    if config.replay is not None:
        share = parse_replay(config.replay)
        named = _named_source(share.path, "dataset.replay", bundled)
        if named.path in [each.path for each in found]:
            raise UserError(f"dataset.replay: '{share.path}' is what is trained on anyway.")
        found.append(replace(named, own_eval=None, replay=share.weight))
    return found


def _named_source(name: str, key: str, bundled: bool, weight: float | None = None) -> NamedSource:
    """A source by its path or, with the bundled model, by the name of its family."""
    family = name in BUNDLED_SETS
    if family and bundled:
        train = f"{BUNDLED}data/{BUNDLED_SETS[name]}"
        own_eval = train.replace("/train.", "/eval.")
        return NamedSource(train, key, own_eval if in_bundle(own_eval) else None, weight)
    if key != "dataset.train_path" and not family:
        return NamedSource(name, key, weight=weight)
    if bundled:
        raise UserError(
            f"No data set is bundled for dataset '{name}'; give a file with dataset.train_path=FILE."
            f"{nearest(name, BUNDLED_SETS)}"
        )
    raise UserError(
        f"dataset '{name}' names no training data for this model; give a file or a hub id: dataset.train_path=FILE."
    )


@dataclass
class _Opened:
    """A source before it is read."""

    named: NamedSource
    source: Source
    format: str


@dataclass
class _Part:
    """What was read of one source."""

    source: NamedSource
    name: str
    format: str
    key: str  # of its cache entry
    tokens: Tokens


def _check_distinct(opened: list[_Opened]) -> None:
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


def _split(parts: list[_Part], config: DatasetConfig, seed: int) -> tuple[list[Taken], list[Taken]]:
    """What of each part is trained on, and what of them is split off to evaluate on."""
    trained, split = [], []
    for at, part in enumerate(parts):
        whole = _all_of(at, part.tokens)
        apart = config.eval_path or part.source.own_eval or part.source.replay is not None
        both = None if apart or not config.eval_fraction else split_off(part.tokens, config.eval_fraction, seed)
        if both is None:
            trained.append(whole)
            continue
        held_out, asked = both
        trained.append(Taken(at, np.flatnonzero(~held_out), asked))
        split.append(Taken(at, np.flatnonzero(held_out), ~asked))
    return trained, split


def _shared(
    parts: list[_Part], trained: list[Taken], config: DatasetConfig, seed: int, notes: list[str], warnings: list[str]
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
        replace(each, examples=each.examples[drawn(count, size, seed, f"mix {part.source.path}")])
        for part, each, size, count in zip(parts, trained, sizes, wanted, strict=True)
    ]
    learnt = [part.tokens.dataset.subset(each.examples).num_labelled for part, each in zip(parts, chosen, strict=True)]
    _say_shares(parts, sizes, wanted, learnt, notes, warnings)
    return chosen


def _say_shares(
    parts: list[_Part], sizes: list[int], wanted: list[int], learnt: list[int], notes: list[str], warnings: list[str]
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


class _Reader:
    """Sources to tokens, by one configuration; collects what there is to say about them."""

    def __init__(self, config: DatasetConfig, encoder: Encoder, max_length: int, cache: Cache) -> None:
        self.config, self.encoder, self.max_length, self.cache = config, encoder, max_length, cache
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def open(self, named: NamedSource, role: str, seed: int) -> _Opened:
        """A source and its format. A file to evaluate on is not streamed."""
        config, training = self.config, role == "training"
        source = open_source(
            named.path, split=config.hub_split if training else None, key=named.key,
            stream=seed if training and config.streaming else None,
        )  # fmt: skip
        format = detect_format(source.first(DETECTION_RECORDS)) if config.format == "auto" else config.format
        return _Opened(named, source, format)

    def check(self, opened: list[_Opened]) -> None:
        """Refuses settings of a format that no source has."""
        config = self.config
        for name, of, what in (
            ("plain_chat", "messages", "chats"),
            ("paths", "oasst_trees", "message trees"),
            ("language", "oasst_trees", "message trees"),
        ):
            if getattr(config, name) in (False, "best", None) or of in [each.format for each in opened]:
                continue
            has = ", ".join(f"{each.source.name} has format {each.format}" for each in opened)
            value = str(getattr(config, name)).lower()
            raise UserError(f"dataset.{name}={value}: applies to {what} (format {of}), but {has}; leave it out.")

    def read(self, opened: _Opened, role: str, count: int | None) -> _Part:
        """The first `count` records of a source, in tokens."""
        source, format = opened.source, opened.format
        key, tokens, cached = self._cached(source, format, role, count)
        facts = tokens.facts
        if role == "training":
            how = "detected" if self.config.format == "auto" else "as set"
            files = f" ({len(source.files):,} files)" if len(source.files) > 1 else ""
            self.notes.append(f"{facts.records} training records from {source.name}{files}, format {format} ({how})")
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
        return _Part(opened.named, source.name, format, key, tokens)

    def _cached(self, source: Source, format: str, role: str, count: int | None) -> tuple[str, Tokens, Path | None]:
        """The tokens, under which key they are cached, and where they were found if they need not be made."""
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
            return key, tokens, self.cache.path(key)
        with self.cache.making(key) as writer:
            self._write(source, format, role, count, writer)
            if source.content() != content:
                raise UserError(f"{source.name} was changed while it was read; start again once it is complete.")
        tokens = self.cache.load(key)
        assert tokens is not None
        return key, tokens, None

    def _refuse_mixed(self, mixed: str | None) -> None:
        """A format that was set holds for all records; one that was detected is no reason to read others by it."""
        if mixed is not None and self.config.format == "auto":
            raise UserError(mixed)

    def _settings(self, format: str, count: int | None) -> dict[str, Any]:
        config = self.config
        own = {"messages": ["plain_chat"], "oasst_trees": ["paths", "language"]}.get(format, [])
        return {"format": format, "max_length": self.max_length, "max_examples": count} | {
            name: getattr(config, name) for name in ("too_long", "loss_on_prompt", *own)
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


def split_off(tokens: Tokens, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which examples to evaluate on, bool (examples,), and which questions the others ask, bool (questions,).

    Examples of one record go to one side, so a conversation does not evaluate itself; with a single record the examples
    are split one by one. `fraction` is a share of the records in (0, 1), rounded, at least one and never all. None if
    there is one example only.
    """
    names, groups = np.unique(tokens.records, return_inverse=True)
    if len(names) == 1:
        names = groups = np.arange(len(tokens.records))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    if count == 0:
        return None
    held_out = np.zeros(len(names), bool)
    held_out[seeded_first(count, len(names), seed, "evaluation")] = True
    held_out = held_out[groups]
    return held_out, np.isin(tokens.question_records, tokens.records[~held_out])


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
