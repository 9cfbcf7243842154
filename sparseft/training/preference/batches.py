"""What TRL's trainers are given: data sets that are tokenised already, and batches in the form of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from sparseft.data.loaded import Preferences
from sparseft.data.tokenized import IGNORED, TokenizedDataset
from sparseft.errors import UserError
from sparseft.training.spikes import ROW
from sparseft.training.trainer import COUNT, LEARNT, PLACES

Ids = list[int]


class Tokenised(datasets.Dataset):
    """The places of examples in what a collator looks up. TRL's trainers tokenise by `map` and `filter`, which here
    leave all as it is."""

    lengths: np.ndarray  # int64: tokens of each example

    @classmethod
    def of(cls, preferences: Preferences, first: int = 0) -> Tokenised:
        """first: the place of the first one."""
        places = {ROW: list(range(first, first + len(preferences)))}
        lengths = [part.lengths for part in (preferences.better, preferences.worse)]
        if preferences.paired:
            made = cls.from_dict(places)
            made.lengths = lengths[0] + lengths[1]
        else:
            order = interleaved(*map(len, lengths))
            made = cls.from_dict(places | {"label": (order < len(lengths[0])).tolist()})
            made.lengths = np.concatenate(lengths)[order]
        return made

    def map(self, *_: Any, **__: Any) -> Tokenised:  # type: ignore[override]
        """Itself."""
        return self

    def filter(self, *_: Any, **__: Any) -> Tokenised:  # type: ignore[override]
        """Itself."""
        return self


def interleaved(first: int, second: int) -> np.ndarray:
    """The places of two sequences, the second's behind the first's, such that each is spread evenly over both."""
    spread = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in (first, second)])
    return np.argsort(spread, kind="stable")


class Examples:
    """What is at a place: a pair, or an answer with its label, in the names that TRL gives them."""

    def __init__(self, *parts: Preferences) -> None:
        """Places go on from one part to the next."""
        self.parts = parts
        self.orders = [None if each.paired else interleaved(len(each.better), len(each.worse)) for each in parts]

    def __getitem__(self, place: int) -> dict[str, Any]:
        part, order = self.parts[0], self.orders[0]
        if place >= len(part):
            part, order, place = self.parts[1], self.orders[1], place - len(part)
        if order is None:
            return pair(part.better, part.worse, place)
        at = int(order[place])
        good = at < len(part.better)
        prompt, answer = halves(part.better[at] if good else part.worse[at - len(part.better)])
        return {"prompt_ids": prompt, "completion_ids": answer, "label": good}

    def next_to(self, place: int) -> dict[str, Any]:
        """What is at another place of the same part, where it has one."""
        first = 0 if place < len(self.parts[0]) else len(self.parts[0])
        count = len(self.parts[1 if first else 0])
        return self[first + (place - first + 1) % count]


def halves(example: dict[str, Ids]) -> tuple[Ids, Ids]:
    """The ids before the first one that is learnt, and from it on."""
    start = next(at for at, label in enumerate(example["labels"]) if label != IGNORED)
    return example["input_ids"][:start], example["input_ids"][start:]


def pair(better: TokenizedDataset, worse: TokenizedDataset, place: int) -> dict[str, Any]:
    """Two answers to the prompt that they have in common."""
    (prompt, chosen), (other, rejected) = halves(better[place]), halves(worse[place])
    if prompt != other:  # a template that looks ahead: what is alike is the prompt
        shorter = min(len(prompt), len(other))
        start = next((at for at in range(shorter) if prompt[at] != other[at]), shorter)
        if start == 0:
            raise UserError(
                f"pair {place}: the chat template writes its prompt in two ways, which have no beginning alike."
            )
        prompt, chosen, rejected = prompt[:start], prompt[start:] + chosen, other[start:] + rejected
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


class Collator:
    """Places to a batch in the form of one of TRL's trainers (`form`), which says of itself what the host must know.

    Rows that several processes' data are lengthened by (`sampling.PaddedDataset`) have no place. They are left out; a
    batch of nothing else has no `PLACES`.
    """

    def __init__(self, examples: Examples, form: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.examples, self.form = examples, form
        self.unpaired = examples.orders[0] is not None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        places = [row[ROW] for row in rows if ROW in row]
        taken = places or [0]  # of nothing: whatever takes part in what all processes do, and counts for nothing
        found = mismatched_in(self.examples, taken) if self.unpaired else [self.examples[place] for place in taken]
        answers = [len(ids) for each in found for name, ids in each.items() if name in ANSWERS]
        prompts = sum(len(each["prompt_ids"]) for each in found) * (len(answers) // len(found))
        return {
            **self.form(found),
            COUNT: sum(answers) + prompts if places else 0,
            LEARNT: sum(answers) if places else 0,
            PLACES: places,
        }


ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def form_of(name: str, pad: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """TRL's own collator for the trainer `name`, from what `Examples` gives; padded with the id `pad`."""
    if name == "DPO":
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return DataCollatorForPreference(pad_token_id=pad)
    if name == "KTO":
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        return DataCollatorForUnpairedPreference(pad_token_id=pad)
    from trl.experimental.utils import DPODataCollatorWithPadding

    padded = DPODataCollatorWithPadding(pad_token_id=pad)
    return lambda found: padded([as_sequences(each) for each in found])


def mismatched(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt with the answer before it in the batch too, of which KTO estimates its divergence from the base. TRL
    lays these out once, for batches in the order of the file; here for the batch at hand."""
    return [{**each, "KL_completion_ids": found[at - 1]["completion_ids"]} for at, each in enumerate(found)]


def mismatched_in(examples: Examples, places: Sequence[int]) -> list[dict[str, Any]]:
    """`mismatched` of a batch; the answer of one that is alone in it is another example's."""
    found = [examples[place] for place in places]
    return mismatched(found) if len(found) > 1 else mismatched([*found, examples.next_to(places[0])])[:1]


def as_sequences(found: dict[str, Any]) -> dict[str, Ids]:
    """A pair as two whole sequences with labels."""
    prompt = found["prompt_ids"]
    made = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        ids = prompt + found[f"{side}_ids"]
        made[f"{side}_input_ids"], made[f"{side}_attention_mask"] = ids, [1] * len(ids)
        made[f"{side}_labels"] = [IGNORED] * len(prompt) + found[f"{side}_ids"]
    return made
