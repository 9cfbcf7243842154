"""A `DatasetConfig` and a tokenizer to training and evaluation examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparseft.config import BUNDLED, DatasetConfig
from sparseft.data.batches import seeded_order
from sparseft.data.chat import convert_messages
from sparseft.data.formats import Example, check_format, convert, detect_format
from sparseft.data.sources import BUNDLED_ROOT, Records, read_records
from sparseft.data.tokenized import Encoder, Tokenized, TokenizedDataset, tokenize
from sparseft.errors import UserError, nearest

# What the package bundles for a family of data sets: training file, and an evaluation file where there is one.
BUNDLED_SETS = {
    "commonsense": "commonsense/train.json",
    "arithmetic": "arithmetic/train.json",
    "oasst1": "oasst1/train.jsonl",
    "text": "text/train.txt",
    "json": "commonsense/train.json",
}
TOO_LONG = ("cut_answer", "drop")


@dataclass
class LoadedData:
    train: TokenizedDataset
    eval: TokenizedDataset | None  # None: no evaluation examples
    format: str  # one of formats.FORMATS, given or detected
    train_source: str  # as the user or the config named it
    eval_source: str  # empty without evaluation examples
    fingerprint: str  # sha256 over the tokenised training examples, labels included
    dropped: int  # training and split-off examples left out as too long or without a token to learn
    cut: int  # of those kept, how many had their answer cut
    tokens: int  # of the training examples
    notes: list[str] = field(default_factory=list)  # sentences to tell the user: format, counts, overlap


def load_datasets(config: DatasetConfig, tokenizer: Any, *, max_length: int, seed: int, bundled: bool) -> LoadedData:
    """Reads, converts, splits and tokenises what `config` names.

    Training examples come from `train_path`; else, with the bundled model (`bundled`), from the bundled set of the
    family `config.name`; else from `hub_path`. Evaluation examples come from `eval_path`; else from the bundled set's
    own evaluation file; else `eval_fraction` of the training records is split off by a permutation of `seed`: at
    least one where there are two, and never all. Where there is one record only (a long text), its pieces are split.
    `max_examples` cuts the training records before anything else. `max_length` is in tokens.

    Raises UserError for a wrong setting, a missing or broken file, a bad record, or if no example is left.
    """
    _check(config, max_length)
    path, split, own_eval = _training_path(config, bundled)
    encoder = Encoder(tokenizer)
    notes: list[str] = []

    records = read_records(path, split=split, key="dataset.train_path").first(config.max_examples)
    format = detect_format(records) if config.format == "auto" else config.format
    how = "detected" if config.format == "auto" else "as set"
    notes.append(f"{len(records)} training records from {records.source}, format {format} ({how})")
    whole = _tokenize(records, format, encoder, config, max_length, notes, "training")

    train, evaluation, eval_source = whole.dataset, None, ""
    eval_path = config.eval_path or own_eval
    if eval_path:
        eval_records = read_records(eval_path, split=None, key="dataset.eval_path")
        eval_format = detect_format(eval_records) if config.format == "auto" else config.format
        evaluation = _tokenize(eval_records, eval_format, encoder, config, max_length, notes, "evaluation").dataset
        eval_source = eval_records.source
    elif config.eval_fraction > 0:
        kept, held_out = split_off(whole.records, config.eval_fraction, seed)
        if held_out:
            train, evaluation = whole.dataset.subset(kept), whole.dataset.subset(held_out)
            eval_source = f"{records.source} ({len(held_out)} examples split off)"
        else:
            notes.append("a single example cannot be split: no evaluation examples")
    if evaluation is not None:
        notes += _overlap(train, evaluation)
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so answers do not teach the model to stop")
    return LoadedData(
        train=train,
        eval=evaluation,
        format=format,
        train_source=records.source,
        eval_source=eval_source,
        fingerprint=train.fingerprint(),
        dropped=whole.dropped,
        cut=whole.cut,
        tokens=train.num_tokens,
        notes=notes,
    )


def _check(config: DatasetConfig, max_length: int) -> None:
    check_format(config.format)
    if config.too_long not in TOO_LONG:
        raise UserError(
            f"dataset.too_long: there is no choice '{config.too_long}'.{nearest(config.too_long, TOO_LONG)}"
        )
    if not 0 <= config.eval_fraction < 1:
        raise UserError(f"dataset.eval_fraction is {config.eval_fraction}; expected a share in [0, 1).")
    if config.max_examples is not None and config.max_examples < 1:
        raise UserError(f"dataset.max_examples is {config.max_examples}; expected at least 1, or null for all.")
    if max_length < 2:
        raise UserError(f"trainer.max_length is {max_length} tokens; expected at least 2.")


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
        train = BUNDLED_SETS[config.name]
        own_eval = train.replace("/train.", "/eval.")
        has_eval = (BUNDLED_ROOT / "data" / own_eval).is_file()
        return f"{BUNDLED}data/{train}", config.hub_split, f"{BUNDLED}data/{own_eval}" if has_eval else None
    if config.hub_path:
        return config.hub_path, config.hub_split, None
    raise UserError(
        f"dataset '{config.name}' names no training data for this model; "
        "give a file or a hub id: dataset.train_path=FILE."
    )


def _tokenize(
    records: Records,
    format: str,
    encoder: Encoder,
    config: DatasetConfig,
    max_length: int,
    notes: list[str],
    role: str,
) -> Tokenized:
    examples: list[Example]
    if format == "messages":
        examples, note = convert_messages(records, encoder.tokenizer)
        if note not in notes:
            notes.append(note)
    else:
        examples = convert(records, format)
    done = tokenize(
        examples,
        encoder,
        max_length=max_length,
        too_long=config.too_long,
        loss_on_prompt=config.loss_on_prompt,
        chunk=format == "text",
    )
    if not len(done.dataset):
        raise UserError(
            f"{records.source}: none of the {len(examples)} {role} examples fits trainer.max_length={max_length} "
            f"tokens with dataset.too_long={config.too_long}; allow more tokens."
        )
    if done.dropped:
        notes.append(
            f"{done.dropped} of {len(examples)} {role} examples dropped: no token to learn within {max_length} tokens"
        )
    if done.cut:
        notes.append(f"{done.cut} of {len(examples)} {role} examples had their answer cut at {max_length} tokens")
    return done


def split_off(records: list[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of examples to train on and to evaluate on: disjoint, together all, both in ascending order.

    `records[i]` is the record that example i came from. Examples of one record go to one side, so a conversation
    does not evaluate itself; with a single record the examples are split one by one. `fraction` is a share of the
    records in (0, 1), rounded, at least one and never all. The second list is empty if there is one example only.
    """
    groups = records if len(set(records)) > 1 else list(range(len(records)))
    names = sorted(set(groups))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    held_out = {names[index] for index in seeded_order(len(names), seed, "evaluation")[:count]}
    kept = [index for index, group in enumerate(groups) if group not in held_out]
    return kept, [index for index, group in enumerate(groups) if group in held_out]


def _overlap(train: TokenizedDataset, evaluation: TokenizedDataset) -> list[str]:
    seen = set(train.example_keys())
    shared = sum(key in seen for key in evaluation.example_keys())
    if not shared:
        return []
    return [f"{shared} of {len(evaluation)} evaluation examples are also training examples, token for token"]
