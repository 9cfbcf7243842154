"""What a run was trained on, by its files, and which tasks that trains for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparseft.evaluation.llm_adapters import GROUPS
from sparseft.evaluation.mmlu import MMLU, MMLU_CATEGORIES

# Of the groups that are made here, whichever of them was evaluated.
MEMBERS: dict[str, Iterable[str]] = {
    **GROUPS,
    **{f"{MMLU}_{name}": [f"{MMLU}_{each}" for each in subjects] for name, subjects in MMLU_CATEGORIES.items()},
    MMLU: [f"{MMLU}_{each}" for subjects in MMLU_CATEGORIES.values() for each in subjects],
}

# Names of files and folders that say nothing of what they hold: `train-00000-of-00002.parquet`, `*.jsonl`.
SPLIT = re.compile(
    r"(train(ing)?|test|val(id(ation)?)?|dev|data|dataset|main|default|all|part)(?![a-z])|[^a-z]*(\.[a-z]|$)"
)


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
    config: dict[str, Any],
    environment: dict[str, Any],
    summary: dict[str, Any],
    tasks: Mapping[str, Iterable[str]],
) -> set[str]:
    """Those of `tasks` (with their members, of groups) that a run was trained for: what `trainer.eval_task` names, or
    the family of the data, or what stands in the name of a source; the members of such a group; and a group with such a
    member, which is no measure of what was forgotten.
    """
    chosen, trainer = _section(config, "dataset"), _section(config, "trainer")
    mix = chosen.get("mix")
    own = [*(mix if isinstance(mix, list) else []), chosen.get("train_path"), chosen.get("replay")]
    names = [_name_of(str(each)) for each in (*own, *sources_of(config, environment, summary)) if each]
    said = {str(name) for name in (trainer.get("eval_task"), summary.get("eval_task"), chosen.get("name")) if name}
    # Those that were not found, or not asked, are members all the same.
    members = {name: {*MEMBERS.get(name, ()), *tasks.get(name, ())} for name in {*MEMBERS, *tasks}}
    known = set(members).union(*members.values())
    found = {task for task in known if task in said or any(_words(task) in name for name in names)}
    found = found.union(*(members.get(group, ()) for group in found))
    return {task for task in tasks if task in found or not found.isdisjoint(members.get(task, ()))}


def _name_of(source: str) -> str:
    """The words of a source's name: of a path its last part, with its folder where that says no more than a split."""
    *above, name = re.split(r"[/\\]+", source.rstrip("/\\"))
    is_split = SPLIT.match(name.lower())
    return _words(f"{above[-1]} {name}" if above and is_split else name)


def _words(text: str) -> str:
    """` commonsense 170k ` of `commonsense_170k`: what is one name in another, whatever stands between its words."""
    return f" {re.sub(r'[^0-9a-z]+', ' ', text.lower()).strip()} "


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}
