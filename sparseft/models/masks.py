"""Attention masks without a question to the device.

transformers looks at the values of a mask, or of positions, to see whether an attention mask is needed at all: the host
then waits for the device in every forward pass. Who laid out a batch knows the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedModel, masking_utils

from sparseft.replaced import replaced


@contextlib.contextmanager
def unasked(batch: Collection[str]) -> Iterator[None]:
    """Inside, transformers makes the masks of a batch by the names of its inputs, as `data.packing.Collator` has them:
    with `attention_mask` there is padding, with `position_ids` rows hold several examples, with neither all rows are
    whole, and causal attention as it is needs no mask.

    The masks are the same as ever. Flash attention's own code asks for the lengths of what is padded or packed all the
    same.
    """
    places: list[tuple[Any, str, Any]] = []
    if "attention_mask" in batch or "position_ids" in batch:
        # As where transformers must not look: while it compiles, or captures a CUDA graph.
        places.append((masking_utils, "is_tracing", _yes))
    else:
        places.append((masking_utils, "find_packed_sequence_indices", _none))
    if "attention_mask" not in batch:
        places.append((PreTrainedModel, "warn_if_padding_and_no_attention_mask", _none))  # it reads the ids
    with replaced(*places):
        yield


def _yes(*_: Any) -> bool:
    return True


def _none(*_: Any) -> None:
    return None
