"""What a run was trained on, by its files, and which tasks that trains for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sparseft.config import DatasetConfig


def sources_of(config: dict[str, Any], environment: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """What the training data are called, source by source: an id of the hub with its subset and split, or a path.

    config, environment, summary: what a run's files hold.
    """
    data, chosen = _section(environment, "data"), _section(config, "dataset")
    known = data.get("sources")
    if isinstance(known, list):
        return [str(name) for name in known]
    train = data.get("train") or summary.get("dataset")
    if train is None:
        return []
    # A run of an earlier version has them in one line.
    return str(train).split(" + ") if chosen.get("mix") or chosen.get("replay") else [str(train)]


def trained_for(
    config: dict[str, Any], environment: dict[str, Any], summary: dict[str, Any], tasks: Iterable[str]
) -> set[str]:
    """Those of `tasks` (or groups) that the data are for: named like their family, or in the name of a source.

    The family that is chosen where none is says nothing of data of the user's own.
    """
    chosen = _section(config, "dataset")
    family, mix = chosen.get("name"), chosen.get("mix")
    own = [*(mix if isinstance(mix, list) else []), chosen.get("train_path"), chosen.get("replay")]
    names = [_words(str(each)) for each in (*own, *sources_of(config, environment, summary)) if each]
    command = str(environment.get("command_line"))
    said = (
        not (mix or chosen.get("train_path"))
        or family != DatasetConfig.name
        or re.search(rf"\bdataset(\.name)?=['\"]?{re.escape(family)}(?![\w-])", command)
    )
    return {task for task in tasks if (said and task == family) or any(_words(task) in name for name in names)}


def _words(text: str) -> str:
    """` commonsense 170k ` of `commonsense_170k`: what is one name in another, whatever stands between its words."""
    return f" {re.sub(r'[^0-9a-z]+', ' ', text.lower()).strip()} "


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}
