"""The sources that a `DatasetConfig` names, and each of them to tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import BUNDLED, DatasetConfig, in_bundle
from sparseft.data.chat import Chats
from sparseft.data.encoding import Encoder, tokenize
from sparseft.data.formats import DETECTION_RECORDS, Converter, Plain, check_records, counted, detect_format
from sparseft.data.mixing import parse_mix, parse_replay
from sparseft.data.oasst_trees import Trees
from sparseft.data.preferences import KEYS, UNPAIRED, Side, detect_preference
from sparseft.data.records import Source
from sparseft.data.sources import open_source
from sparseft.data.templates import chat_date
from sparseft.data.token_cache import Cache, Damaged, Writer, tokens_key
from sparseft.data.tokenized import Tokens
from sparseft.errors import UserError, nearest

# What the package bundles for a family of data sets: training file, and an evaluation file where there is one.
BUNDLED_SETS = {
    "commonsense": "commonsense/train.json",
    "arithmetic": "arithmetic/train.json",
    "oasst1": "oasst1/train.jsonl",
    "text": "text/train.txt",
    "json": "commonsense/train.json",
    "preference": "preference/train.jsonl",
}


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
    published = " (math_10k.json of github.com/AGI-Edgerunners/LLM-Adapters, ft-training_set)"  # on no hub
    raise UserError(
        f"dataset '{name}' names no training data for this model; give a file or a hub id: dataset.train_path=FILE"
        f"{published if name == 'arithmetic' else ''}."
    )


@dataclass
class Opened:
    """A source before it is read."""

    named: NamedSource
    source: Source
    format: str


@dataclass
class Part:
    """What was read of one source."""

    source: NamedSource
    name: str
    format: str
    key: str  # of its cache entry
    tokens: Tokens


class Reader:
    """Sources to tokens, by one configuration; collects what there is to say about them."""

    def __init__(self, config: DatasetConfig, encoder: Encoder, max_length: int, cache: Cache) -> None:
        self.config, self.encoder, self.max_length, self.cache = config, encoder, max_length, cache
        self.day = chat_date(config, encoder.tokenizer)
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def open(self, named: NamedSource, role: str, seed: int, preferences: bool = False) -> Opened:
        """A source and its format, of `formats.py` or of `preferences.py`. What is evaluated on is read in its own
        order, all of it."""
        config, training = self.config, role == "training"
        source = open_source(
            named.path, split=config.hub_split if training else None, key=named.key,
            streaming=config.streaming, shuffle=seed if training and config.streaming else None,
        )  # fmt: skip
        if preferences == (config.format in KEYS) and config.format != "auto":
            return Opened(named, source, config.format)
        if config.format != "auto":
            kinds = " or ".join(KEYS) if preferences else "another, or objective=dpo, which learns from such records"
            raise UserError(f"dataset.format={config.format}: not a format of this objective; give {kinds}.")
        detect = detect_preference if preferences else detect_format
        return Opened(named, source, detect(source.first(DETECTION_RECORDS)))

    def check(self, opened: list[Opened]) -> None:
        """Refuses settings of a format that no source has."""
        config = self.config
        for name, of, what in (
            ("plain_chat", ("messages", *KEYS), "chats"),
            ("paths", ("oasst_trees",), "message trees"),
            ("language", ("oasst_trees",), "message trees"),
        ):
            if getattr(config, name) in (False, "best", None) or any(each.format in of for each in opened):
                continue
            has = ", ".join(f"{each.source.name} has format {each.format}" for each in opened)
            value = str(getattr(config, name)).lower()
            raise UserError(f"dataset.{name}={value}: applies to {what} (format {of[0]}), but {has}; leave it out.")

    def read(self, opened: Opened, role: str, count: int | None, side: str | None = None) -> Part:
        """The first `count` records of a source, in tokens; of preferences one side of them."""
        source, format = opened.source, opened.format
        key, tokens, cached = self._cached(source, format, role, count, side)
        facts = tokens.facts
        if role == "training":
            how = "detected" if self.config.format == "auto" else "as set"
            files = f" ({len(source.files):,} files)" if len(source.files) > 1 else ""
            note = f"{counted(facts.records, 'training record')} from {source.name}{files}, format {format} ({how})"
            self.notes += [note] if note not in self.notes else []
        self.notes += [note for note in facts.notes if note not in self.notes]
        self.warnings += [warning for warning in facts.warnings if warning not in self.warnings]
        limit = f"{self.max_length} tokens"
        role, what, end = (f"{role}'s {side}", "answers", "end") if side else (role, "examples", "answer")
        if facts.dropped:
            self.notes.append(
                f"{facts.dropped} of {facts.examples} {role} {what} dropped: no token to learn within {limit}"
            )
        if facts.cut:
            self.notes.append(f"{facts.cut} of {facts.examples} {role} {what} had their {end} cut at {limit}")
        if cached is not None:
            self.notes.append(f"{role} tokens: cached, {cached}")
        return Part(opened.named, source.name, format, key, tokens)

    def _cached(
        self, source: Source, format: str, role: str, count: int | None, side: str | None
    ) -> tuple[str, Tokens, Path | None]:
        """The tokens, under which key they are cached, and where they were found if they need not be made."""
        with console.working(f"reading {source.name}"):
            content = source.content()
        key = tokens_key(content, self.encoder.tokenizer, self._settings(format, count, side))
        try:
            tokens = self.cache.load(key)
        except Damaged as damage:
            self.warnings.append(f"the cached tokens are damaged and are made anew: {damage}")
            tokens = None
        if tokens is not None:
            self._refuse_mixed(tokens.facts.mixed)
            return key, tokens, self.cache.path(key)
        with self.cache.making(key) as writer:
            self._write(source, format, role, count, writer, side)
            if source.content() != content:
                raise UserError(f"{source.name} was changed while it was read; start again once it is complete.")
        tokens = self.cache.load(key)
        assert tokens is not None
        return key, tokens, None

    def _refuse_mixed(self, mixed: str | None) -> None:
        """A format that was set holds for all records; one that was detected is no reason to read others by it."""
        if mixed is not None and self.config.format == "auto":
            raise UserError(mixed)

    def _settings(self, format: str, count: int | None, side: str | None) -> dict[str, Any]:
        config = self.config
        own = {"messages": ["plain_chat"], "oasst_trees": ["paths", "language"]}.get(
            format, ["plain_chat"] if side else []
        )
        apart = {"side": side} if side else {}
        if self.day is not None and not config.plain_chat and (side or format == "messages"):
            apart["day"] = self.day
        return {"format": format, "max_length": self.max_length, "max_examples": count, **apart} | {
            name: getattr(config, name) for name in ("too_long", "loss_on_prompt", *own)
        }

    def _write(
        self, source: Source, format: str, role: str, count: int | None, writer: Writer, side: str | None
    ) -> None:
        converter: Converter
        if side is not None:
            converter = Side(self.encoder, format, side, self.config.plain_chat, self.day)
        elif format == "messages":
            converter = Chats(self.encoder, self.config.plain_chat, self.day)
        elif format == "oasst_trees":
            converter = Trees(self.config.paths, self.config.language)
        else:
            converter = Plain(format)
        with console.Progress(None, f"tokenising the {role} data", unit="record", keeps=False) as progress:
            for records in source.chunks(count):
                mixed = check_records(records, format) if side is None else None  # a side looks at each record itself
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
        facts.warnings += converter.warnings()
        if facts.examples == 0:
            if format == UNPAIRED:
                return  # there may be good answers alone to evaluate on
            why = "; ".join([*facts.warnings, *facts.notes])
            raise UserError(f"{source.name}: none of the {facts.records} {role} records holds an example ({why}).")
        if facts.dropped == facts.examples:
            raise UserError(
                f"{source.name}: none of the {facts.examples} {role} examples fits trainer.max_length="
                f"{self.max_length} tokens with dataset.too_long={self.config.too_long}; allow more tokens."
            )
