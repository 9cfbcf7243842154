"""Attention masks without a question to the device, and one for all layers.

transformers looks at the values of a mask, or of positions, to see whether an attention mask is needed at all: the host
then waits for the device in every forward pass. Who laid out a batch knows the answer.

What it then makes for torch's attention is boolean, and torch turns that into numbers to be added to the scores: anew
in each layer, whose backward pass keeps them. A mask that is made of such numbers is kept once.

Where rows that are learnt from are padded, which is on the right, no token sees padding that sees earlier ones alone:
causal attention needs no mask for it, and torch takes its own causal kernel, as with whole rows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from sparseft.replaced import replaced

MASKS = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
LEARNT = {"labels", "attention_mask"}  # inputs of padded rows with labels
padded_on_the_right = False


@contextlib.contextmanager
def unasked(batch: Collection[str]) -> Iterator[None]:
    """Inside, transformers makes the masks of a batch by the names of its inputs, as `data.packing.Collator` has them:
    with `attention_mask` there is padding (with `labels` too: on the right), with `position_ids` rows hold several
    examples, with neither all rows are whole, and causal attention as it is needs no mask.

    They leave out what they ever do. Flash attention's own code asks for the lengths of what is padded or packed all
    the same.
    """
    places: list[tuple[Any, str, Any]] = [
        # One that is somebody's own stays.
        (MASKS, "_local_mapping", {"sdpa": added, **MASKS._local_mapping}),
        (sys.modules[__name__], "padded_on_the_right", LEARNT <= set(batch)),
    ]
    if "attention_mask" in batch or "position_ids" in batch:
        # As where transformers must not look: while it compiles, or captures a CUDA graph.
        places.append((masking_utils, "is_tracing", _yes))
    else:
        places.append((masking_utils, "find_packed_sequence_indices", _none))
    if "attention_mask" not in batch:
        places.append((PreTrainedModel, "warn_if_padding_and_no_attention_mask", _none))  # it reads the ids
    with replaced(*places):
        yield


def needs_none(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's causal attention is as good as one with a mask, on that type of device and in that dtype: CUDA's
    causal kernel for fewer keys than queries is for 16 bits."""
    return device != "cuda" or dtype.itemsize == 2


def added(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    config: object = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """transformers' mask for torch's attention, (batch, 1, tokens, tokens), as numbers that are added to the scores: 0,
    and the lowest of the dtype that is computed with. None: none is needed.

    A model whose config is not one of transformers gets a boolean one: its code may compute queries in another dtype
    than its embeddings', with which torch takes no other."""
    known = type(config).__module__.startswith("transformers.")
    device = torch.device(options.get("device", "cpu")).type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    dropped = padded_on_the_right and known and needs_none(device, dtype) and options.get("allow_is_causal_skip")
    if dropped and not getattr(config, "use_bidirectional_attention", None):  # there the mask alone makes it causal
        options["attention_mask"] = None
        # transformers' own answer is another while it must not look.
        if q_length == kv_length and q_offset == 0 and (local_size is None or kv_length < local_size):
            return None
    shape = batch_size, q_length, kv_length, q_offset, kv_offset
    mask = masking_utils.sdpa_mask(*shape, config=config, local_size=local_size, **options)
    if mask is None or not known:
        return mask
    rows, tokens = mask.shape[0], mask.shape[-1]
    if mask.stride(0) == 0:  # the same in all rows
        mask = mask[:1]
    # Rows begin at multiples of 16, or torch's kernel for GPUs copies the mask in each layer.
    numbers = torch.zeros(*mask.shape[:-1], -(-tokens // 16) * 16, dtype=dtype, device=mask.device)[..., :tokens]
    return numbers.masked_fill_(~mask, torch.finfo(dtype).min).expand(rows, -1, -1, -1)


def _yes(*_: Any) -> bool:
    return True


def _none(*_: Any) -> None:
    return None
