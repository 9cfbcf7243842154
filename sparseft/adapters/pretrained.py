"""`save_pretrained` of a model with sparse adapters, as `Trainer`, TRL and `push_to_hub` call it.

The folder is a Hugging Face model whose weights hold what was learnt; the deltas stand in it too, under names of their
own, so that a resumed `Trainer` goes on exactly. Beside it, in `adapter/`, lies what `load_adapter` and
`sparseft export` read.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from sparseft.adapters.state import require_state
from sparseft.distributed.shards import any_sharded
from sparseft.errors import UserError
from sparseft.files.atomic import check_replaceable, replaced_folder
from sparseft.files.hub import REPLACED
from sparseft.files.tensors import DESCRIPTIONS
from sparseft.runs.folder import ADAPTER


def listen(model: nn.Module) -> None:
    """Lets a model's `save_pretrained` write its adapter too."""
    if hasattr(type(model), "save_pretrained") and "save_pretrained" not in vars(model):
        model.save_pretrained = functools.partial(save_pretrained, model)  # type: ignore[assignment]


def ignore(model: nn.Module) -> None:
    """Takes back `listen`."""
    if getattr(vars(model).get("save_pretrained"), "func", None) is save_pretrained:
        del model.save_pretrained


def save_pretrained(
    model: Any, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    """The model's own `save_pretrained`, and the active adapter in `save_directory/adapter`.

    Weights keep the names that they have in the model, which `from_pretrained` reads too. transformers would take the
    deltas of experts for experts and split them, and its `Trainer` resumes from no other names.

    Raises `UserError` where `adapter` holds other files, or with `push_to_hub=True`, which uploads no more than what
    transformers itself has just written; before anything is written.
    """
    kwargs["save_original_format"] = False
    state, folder = require_state(model), Path(save_directory) / ADAPTER
    # of shards saving is a call of all processes, and this one is not
    writes = is_main_process and state.active is not None and not any_sharded(model)
    if writes:
        if kwargs.get("push_to_hub") or any(args[1:2]):  # by its place, behind state_dict
            raise UserError(
                "save_pretrained(push_to_hub=True) would upload the weights without the adapter: "
                "model.push_to_hub('owner/name') uploads both."
            )
        check_replaceable(folder, DESCRIPTIONS, REPLACED)
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    if writes:
        with replaced_folder(folder, DESCRIPTIONS, REPLACED) as aside:
            state.kind.save(model, state, state.active, aside, None)
