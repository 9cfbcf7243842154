"""Which calibration samples a rank runs, which of them share a forward pass, and how they are padded into one.

A sample counts by itself: what is summed over a group equals the sum over its samples one at a time. Padding stands on
the right, where causal attention keeps it from every real position without a mask (with any other attention samples go
one at a time), and its own positions are left out of all sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.distributed import ranks
from sparseft.distributed.shards import any_sharded
from sparseft.errors import UserError
from sparseft.models.decoder import decoder_layers, other_stacks, stacks
from sparseft.models.head import head_is_apart

Sample = dict[str, Tensor]  # batches of one, without padding

# Samples are sorted by length within windows of so many, so that a group has little padding. A fixed number: groups
# must be the same when an interrupted run goes on.
WINDOW = 32
# Losses that are the mean cross-entropy of the next token: transformers' own of every "…ForCausalLM", and of those
# classes whose names do not say so.
USUAL_LOSS, USUAL_CLASSES = "ForCausalLM", ("GPT2LMHeadModel",)
FILL = {"input_ids": 0, "labels": -100}


@dataclass(frozen=True)
class Group:
    """Samples that the model runs at once."""

    samples: list[Sample]
    padded: bool = False  # as one batch, whose loss is computed here; else one after the other
    shown: bool = True  # to observers; a rank that has no samples left runs along for the others' shards


@dataclass(frozen=True)
class Share:
    """Which part of the samples is a rank's: every `world`-th, beginning with the `rank`-th, without its first
    `groups` groups, which were done before an interruption."""

    rank: int = 0
    world: int = 1
    groups: int = 0


def groups_of(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    gradients: bool,
    together: int = 0,
    share: Share = Share(),
) -> Iterator[Group]:
    """What a rank runs of the batches' samples.

    A model in shards takes all ranks to each pass: samples then go one at a time, and every rank gets as many groups.

    Args:
        gradients: whether losses are differentiated; samples without a labelled token are then passed over.
        together: with `gradients`, tokens that may go through the model at once: several samples then share a forward
            pass, where the model allows it (`may_share`). 0: one sample at a time.
    """
    in_step = any_sharded(model)
    if not (gradients and together and may_share(model)) or in_step:
        together = 0
    samples = (sample for batch in batches for sample in split_samples(batch))
    if gradients:  # the first label predicts nothing: the loss is over labels[1:]
        samples = (sample for sample in samples if (sample["labels"][:, 1:] != -100).any())
    every = list(samples) if in_step else samples
    lists = packed(itertools.islice(every, share.rank, None, share.world), together)
    own = (Group(group, padded=bool(together)) for group in itertools.islice(lists, share.groups, None))
    if not in_step:
        yield from own
        return
    mine = list(own)
    most = max(ranks.all_gather_object(len(mine)))  # asked before any pass, which all ranks make in step
    yield from mine
    yield from [Group(every[:1], shown=False)] * (most - len(mine))


def split_samples(batch: Mapping[str, Any]) -> Iterator[Sample]:
    """The batch's samples as batches of one, without the positions that the attention mask leaves out, nor the mask."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UserError(
            "each calibration batch is to be a dict with input_ids of shape (batch, tokens), as the model takes them."
        )
    mask = batch.get("attention_mask")
    for i in range(len(ids)):
        kept = mask[i].bool() if mask is not None else torch.ones_like(ids[i], dtype=torch.bool)
        sample = {}
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                continue
            if name == "attention_mask" and "position_ids" not in batch:  # with it none of those begins an example
                continue
            row = value[i : i + 1]
            sample[name] = row[:, kept] if value.dim() >= 2 and value.shape[1] == ids.shape[1] else row
        sample.setdefault("labels", sample["input_ids"])
        if sample["input_ids"].numel():
            yield sample


def may_share(model: nn.Module) -> bool:
    """Whether padded samples can go through the model together.

    Not where attention is not causal, which would see the padding; nor where experts are (padding would be routed to
    them, and their inputs do not tell samples apart); nor where the model's loss is another than the usual one, which
    is computed here for each sample apart (`loss.py`).
    """
    if getattr(model, "loss_type", None) != USUAL_LOSS and type(model).__name__ not in USUAL_CLASSES:
        return False
    if any("expert" in name or stacks(m) or other_stacks(m) for name, m in model.named_modules()):
        return False
    return not sees_ahead(model) and head_is_apart(model)


def sees_ahead(model: nn.Module) -> bool:
    """Whether text attends to later tokens, by what the config and the decoder layers' modules say of themselves.

    Config: `is_causal`, by which transformers makes masks, and Gemma's `use_bidirectional_attention`, of which "vision"
    means images alone.
    """
    text = model.config.get_text_config()
    if not getattr(text, "is_causal", True):
        return True
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return True
    return any(getattr(module, "is_causal", True) is False for module in decoder_layers(model)[1].modules())


def packed(
    samples: Iterable[Sample],
    tokens: int,  # of one forward pass, padding included; 0: one sample at a time
) -> Iterator[list[Sample]]:
    """Groups of samples of similar length: at most `tokens` positions a group, or one sample that is longer."""
    if not tokens:
        yield from ([sample] for sample in samples)
        return
    window: list[Sample] = []
    for sample in samples:
        window.append(sample)
        if len(window) == WINDOW:
            yield from _packed_window(window, tokens)
            window = []
    yield from _packed_window(window, tokens)


def _packed_window(window: list[Sample], tokens: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in sorted(window, key=lambda sample: -sample["input_ids"].shape[1]):  # stable, so steady
        longest = (group or [sample])[0]["input_ids"].shape[1]
        if group and ((len(group) + 1) * longest > tokens or not _alike(group[0], sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _alike(first: Sample, second: Sample) -> bool:
    """Only the plainest samples are padded: with position_ids, say, a model may treat a batch of one in its own way."""
    return first.keys() == second.keys() <= FILL.keys()


def pad_together(group: Sequence[Sample]) -> tuple[Sample, Tensor | None]:
    """One batch of the group, padded on the right, and the flat positions of its tokens (None: all of them)."""
    lengths = [sample["input_ids"].shape[1] for sample in group]
    longest = max(lengths)
    batch = {}
    for name in group[0]:
        rows = zip(group, lengths, strict=True)
        fill = FILL.get(name, 0)
        batch[name] = torch.cat([F.pad(sample[name], (0, longest - length), value=fill) for sample, length in rows])
    if min(lengths) == longest:
        return batch, None
    kept = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return batch, kept.reshape(-1).nonzero().squeeze(1)
