"""`preference`: which of two answers a model finds more probable, on pairs that it was not trained on.

Unlike the rewards of a run this asks the model alone, so that the base has a score too. An answer's probability is that
of all its tokens, its end included; per token (`acc_norm`) a long answer is not at a disadvantage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparseft.compose.run_config import from_dict
from sparseft.config import RunConfig
from sparseft.data.encoding import generation_ends
from sparseft.data.loaded import LoadedData, Preferences
from sparseft.data.loading import check_tokens, data_of
from sparseft.data.packing import Collator, padding_id
from sparseft.data.preference_sets import Unpaired, load_pairs
from sparseft.data.templates import end_of_turn
from sparseft.data.tokenized import IGNORED, TokenizedDataset
from sparseft.errors import UserError
from sparseft.evaluation.tasks import PREFERENCE
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.decoder import last_logits
from sparseft.models.loading import vocabulary_rows
from sparseft.runs.folder import CONFIG, check_trained_on

PAIRED = "dpo"  # an objective whose data are pairs
# Of `dataset`: what names training data, and what only holds for the records of one file.
TRAINED_ON = {"name", "train_path", "mix", "hub_path"}
OF_RECORDS = {"format", "paths", "language"}
CPU_BATCH = 8


def settings(config: RunConfig, run: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, Path | None]:
    """What says which pairs are held out: the run's own settings, with what the command says of data; where it names
    other training data, the command's alone. And the run, where they are a part of its own data, as it read them."""
    keys = {word.lstrip("+~").partition("=")[0] for word in overrides}
    given = {key.removeprefix("dataset.") for key in keys if key.startswith("dataset.")}
    if run is None or "dataset" in keys or given & TRAINED_ON:
        dataset = dataclasses.replace(config.dataset, loss_on_prompt=False)
        return dataclasses.replace(config, objective=PAIRED, dataset=dataset), None
    own = from_dict(read_yaml_object(run / CONFIG))
    if "eval_path" in given:
        given |= OF_RECORDS
    changed = {name: getattr(config.dataset, name) for name in given}
    own.dataset = dataclasses.replace(own.dataset, **changed | {"loss_on_prompt": False})  # answers are compared
    if "eval_path" in given and "trainer.max_length" in keys:  # what was split off was cut as the run's data were
        own.trainer = dataclasses.replace(own.trainer, max_length=config.trainer.max_length)
    split_off = own.by_preference and not given and not own.dataset.eval_path
    own.objective, own.cache_dir = PAIRED, config.cache_dir
    return own, run if split_off else None


def held_out(config: RunConfig, tokenizer: Any, model: Any, run: Path | None) -> Preferences:
    """The pairs whose answers differ within the length. UserError where there are none, or where they come from other
    data than `run` has learnt, which may have been any of them. Where they have a file of their own, no training data
    are read."""
    try:
        data = _data(config, tokenizer)
    except Unpaired as error:
        raise UserError(
            f"{PREFERENCE}: {error.source} has one answer a prompt (prompt, completion, label), expected two (prompt, "
            "chosen, rejected); give a file of pairs with dataset.eval_path=FILE."
        ) from error
    if run is not None:
        otherwise = "Give the data as they were, or pairs that it has not seen with dataset.eval_path=FILE."
        check_trained_on(run, data.fingerprint, data.train_source, otherwise)
    check_tokens(data, tokenizer, *vocabulary_rows(model))
    if data.eval_preferences is None:
        raise UserError(f"{PREFERENCE}: no pairs are held out; give dataset.eval_path=FILE.")
    both = data.eval_preferences
    keys = zip(both.better.example_keys(), both.worse.example_keys(), strict=True)
    differ = [place for place, (better, worse) in enumerate(keys) if better != worse]
    if not differ:
        raise UserError(
            f"{PREFERENCE}: the answers of no pair differ within trainer.max_length={config.trainer.max_length} "
            "tokens; allow more."
        )
    return Preferences(
        True, both.better.subset(differ), both.worse.subset(differ), both.left_out + len(both) - len(differ)
    )


def _data(config: RunConfig, tokenizer: Any) -> LoadedData:
    if config.dataset.eval_path:
        return load_pairs(
            config.dataset, tokenizer, objective=config.objective, max_length=config.trainer.max_length,
            seed=config.seed, cache_dir=config.cache_dir,
        )  # fmt: skip
    return data_of(config, tokenizer)


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, pairs: Preferences, max_length: int, batch_size: int | str, limit: int | None
) -> list[dict[str, Any]]:
    """One record a pair, in the order of the data: log-probabilities (nats) of the better and the worse answer, and
    whether the better one has the higher. max_length: the tokens at which they were cut."""
    count = min(len(pairs), limit or len(pairs))
    size = CPU_BATCH if isinstance(batch_size, str) else batch_size
    pad = padding_id(tokenizer, vocabulary_rows(model)[0])
    better, worse = (log_probabilities(model, side, count, size, pad) for side in (pairs.better, pairs.worse))
    ends = generation_ends(tokenizer) | end_of_turn(tokenizer)
    records = []
    for at in range(count):
        (first, tokens), (second, others) = better[at], worse[at]
        example = pairs.better[at]
        start = next(place for place, label in enumerate(example["labels"]) if label != IGNORED)
        texts = [tokenizer.decode([label for label in side[at]["labels"] if label != IGNORED])
                 for side in (pairs.better, pairs.worse)]  # fmt: skip
        right = first > second
        ids = [side[at]["input_ids"] for side in (pairs.better, pairs.worse)]
        records.append(
            {
                "task": PREFERENCE,
                "doc_id": at,
                "prompt": tokenizer.decode(example["input_ids"][:start]),
                "answer": texts[0] if right else texts[1],
                "target": texts[0],
                "correct": right,
                "truncated": any(len(each) == max_length and each[-1] not in ends for each in ids),
                "loglikelihoods": [first, second],
                "metrics": {"acc": float(right), "acc_norm": float(first / tokens > second / others)},
            }
        )
    return records


def log_probabilities(model: Any, data: TokenizedDataset, count: int, size: int, pad: int) -> list[tuple[float, int]]:
    """Of each of the first `count` examples the log-probability of its labelled tokens, and how many these are."""
    collate, found = Collator(pad), []
    for start in range(0, count, size):
        batch = collate([data[at] for at in range(start, min(start + size, count))])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        known = labels != IGNORED
        kept = labels.shape[1] - int(known.any(0).int().argmax())  # from the first label of any row on
        labels, known = labels[:, -kept:], known[:, -kept:]
        logits = model(**batch, use_cache=False, **last_logits(model, kept + 1)).logits[:, -kept - 1 : -1]
        for row, mask in enumerate(known):  # one at a time: fp32 logits of a batch may be large
            chosen = logits[row][mask].float().log_softmax(-1).gather(-1, labels[row][mask].unsqueeze(-1))
            found.append((float(chosen.double().sum()), int(mask.sum())))
        del logits  # before the next ones are made
    return found


def add_to(outcome: dict[str, Any], records: list[dict[str, Any]], pairs: Preferences, max_length: int) -> None:
    """Adds the task to what `results.assemble` made of the others, with an entry such as theirs."""
    count, cut = len(records), sum(record["truncated"] for record in records)
    limit = f"trainer.max_length={max_length} tokens"
    if pairs.left_out:
        outcome["warnings"].append(
            f"{PREFERENCE}: {pairs.left_out} of {len(pairs) + pairs.left_out} pairs left out: an answer is empty or "
            f"does not fit {limit}, or both are the same."
        )
    if cut:
        outcome["warnings"].append(f"{PREFERENCE}: {cut} of {count} pairs had an answer cut at {limit}.")
    means = {name: sum(record["metrics"][name] for record in records) / count for name in ("acc", "acc_norm")}
    errors = {name: math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None for name, mean in means.items()}
    margin = sum(record["loglikelihoods"][0] - record["loglikelihoods"][1] for record in records) / count
    metrics: dict[str, float | None] = {"margin,none": margin}
    for name in means:
        metrics |= {f"{name},none": means[name], f"{name}_stderr,none": errors[name]}
    outcome["tasks"][PREFERENCE] = {
        "accuracy": means["acc"],
        "stderr": errors["acc"],
        "samples": count,
        "shots": 0,
        "truncated": cut,
        "metric": "acc,none",
        "metrics": metrics,
    }
    outcome["members"][PREFERENCE] = [PREFERENCE]
    outcome["samples"][PREFERENCE] = records
