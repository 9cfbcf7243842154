"""A dry session hides what a machine with a GPU may lack, so that it is known to do without."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
from types import ModuleType
from typing import Any

LACKING = {"datasets", "deepspeed", "lm_eval"}


def hide(names: set[str] = LACKING) -> None:
    """From now on, here and in forked processes, these packages are not installed."""
    find, distribution = importlib.machinery.PathFinder.find_spec, importlib.metadata.distribution

    def find_spec(cls: type, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in names else find(name, path, target)

    def found(name: str) -> Any:
        if name.replace("-", "_") in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    importlib.machinery.PathFinder.find_spec = classmethod(find_spec)  # type: ignore[method-assign, assignment]
    importlib.metadata.distribution = found
