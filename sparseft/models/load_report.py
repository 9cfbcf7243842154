"""What transformers says of a model that it has loaded: kept from the screen, and read for what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from sparseft import console
from sparseft.errors import UserError


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Inside, transformers prints no table of weights that do not fit, which speaks of training on, and no bars."""
    import transformers

    usual, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(usual)
        if bars:
            transformers.logging.enable_progress_bar()


def check_complete(path: str, report: Mapping[str, Any]) -> None:
    """`UserError` where the loading report of `from_pretrained` names weights that are missing or of another shape."""
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(_named(key) for key in report.get(problem) or []):
            raise UserError(
                f"model.path={path}: the checkpoint does not fit its config.json: {len(names)} weights are "
                f"{problem.removesuffix('_keys')}, {names[0]} for one."
            )


def tell_unplaced(path: str, report: Mapping[str, Any]) -> None:
    """A warning where the checkpoint holds weights that the model has no place for. Some are left out by intent (those
    of images, of layers that predict further tokens); biases or layers mean that config.json is not the checkpoint's.
    """
    if names := sorted(report.get("unexpected_keys") or []):
        console.warn(
            f"model.path={path}: the model has no place for {len(names)} weights of the checkpoint and goes without "
            f"them, {names[0]} for one."
        )


def _named(key: Any) -> str:
    """A weight of the report: its name, or (name, shape in the file, shape in the model)."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} of shape {tuple(stored)} instead of {tuple(wanted)}"
