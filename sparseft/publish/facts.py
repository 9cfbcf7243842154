"""What a model card says: read from a run's files, or from an adapter's alone. No network, no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.adapters.description import is_whole_model, read_config
from sparseft.config import BUNDLED
from sparseft.console import warn
from sparseft.errors import HUB_ID, UserError, looks_local, without_secrets
from sparseft.evaluation.trained_on import sources_of, trained_for
from sparseft.files.hashing import adapter_hash
from sparseft.files.tensors import ADAPTER_CONFIG, ADAPTER_TENSORS, opened, split_name
from sparseft.files.untrusted import read_json_object, read_yaml_object
from sparseft.kernels.reference import trainable_entries
from sparseft.publish.licences import licence_in
from sparseft.report.numbers import number
from sparseft.runs import folder as runs
from sparseft.runs.metrics import went_on_from

# Groups of the configuration that say nothing of how the adapter came to be, and settings that hold texts of their own.
NOT_SHOWN = {"bench", "eval", "output_dir", "cache_dir", "overwrite"}
TEXTS = {"sample_prompts"}
# Paths in a sentence that begin as such, of which only those in quotes may hold spaces.
BEFORE_PATH = r"(?<![\w.~/>-])(?<!:(?=//))"  # but for a URL's
ROOT = r"(?:~[\w.-]*|\.\.?|[A-Za-z]:)?/"
PATHS = re.compile(rf"""(['"`])({ROOT}[^'"`\n]*)(?=\1)|{BEFORE_PATH}{ROOT}[^\s'"`,;:()<>|]+""")
PARTED = re.compile(r"(.*?)((?: \([^()/]*\))*)", re.DOTALL)  # a source, and its split or what was split off it


@dataclass
class Score:
    """One task's result in shares; of the base and the difference where it answered the same questions."""

    task: str
    accuracy: float
    stderr: float | None
    samples: Any
    shots: Any
    base: float | None
    base_stderr: float | None
    difference_stderr: float | None  # paired, question by question
    data: str | None  # the hub's id of its questions
    split: str | None
    metric: str | None
    overlap: int  # questions that were trained on
    learnt: bool  # of the family that was trained
    asked: bool  # by itself, not as a member of a group


@dataclass
class Role:
    """The linears of one name: how many, their weights, how many of those train."""

    name: str
    linears: int
    weights: int | None
    trained: int


@dataclass
class Facts:
    """Of a run, or of an adapter's folder alone (what only a run knows is then empty).

    kind: sparse | peft | full, or the format of an export; folder: the adapter's; rank: of a LoRA.
    """

    kind: str
    folder: Path
    content: dict[str, Any]
    method: str
    base: str | None
    licence: str | None
    rank: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)

    @property
    def own(self) -> dict[str, Any]:
        """What sparseft says of the adapter, wherever its kind keeps it; empty of a folder made by others."""
        return self.content if "peft_type" not in self.content else self.content.get("sparseft") or {}

    @property
    def base_id(self) -> str | None:
        """The base's id on the hub; None of a folder."""
        return self.base if self.base is not None and is_hub_id(self.base) else None

    @property
    def revision(self) -> str | None:
        return self.group("model").get("revision") or self.content.get("revision")

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer that it was trained with, where that is another than the base's: a hub id or a path."""
        known = self.group("model").get("tokenizer")
        return known if isinstance(known, str) and known != self.base else None

    @property
    def sources(self) -> list[str]:
        """What was trained on, as the run's files name it."""
        return list(dict.fromkeys(sources_of(self.config, self.environment, self.summary)))

    @property
    def paths(self) -> list[str]:
        """What the run's files name that lies in a folder, the longest first: no id of the hub, and nothing bundled."""
        data = self.environment.get("data")
        held_out = str(data.get("eval") or "") if isinstance(data, dict) else ""
        found = {
            str(self.folder.resolve()),
            str(self.folder.parent.resolve()),
            *self.sources,
            held_out,
            self.base or "",
        }
        found.update(_texts({key: part for key, part in self.config.items() if key != "bench"}))
        found = {_parted(each)[0] for each in found} | {each.partition(":")[0] for each in found}
        # `./corpus/x` is `corpus/x` in the settings
        found |= {each.removeprefix("./") for each in found if each.startswith("./")}
        marked = {each for each in found if f"./{each}" in found}
        kept = {each for each in found if "/" in each.strip("/.") and (each in marked or not is_known(each))}
        return sorted(kept, key=lambda each: (-len(each), each))

    def group(self, name: str) -> dict[str, Any]:
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def facts_of(folder: Path, kind: str | None = None, rank: int | None = None) -> Facts:
    """The facts of a run's folder or an adapter's. kind: the format that it is exported in, with its rank.

    Raises:
        UserError: neither a run nor an adapter, a run that has not finished, or a file that cannot be read.
    """
    run = folder if runs.is_run(folder) else None
    place = folder / runs.ADAPTER if run else folder
    if run:
        check_finished(run)
    content = read_config(place)
    whole = is_whole_model(place)
    own = content.get("sparseft") or {}
    method = content.get("method") or own.get("method") or str(content.get("peft_type", "")).lower()
    named = content.get("base_model") or own.get("base_model") or content.get("base_model_name_or_path")
    facts = Facts(
        kind or ("full" if whole else "peft" if "peft_type" in content else "sparse"),
        place,
        content,
        str(method),
        None if named is None else str(named),
        None,
    )
    facts.licence = licence_in(facts.base) if facts.base else None
    known = number(content.get("r")) if kind is None else rank
    facts.rank = None if known is None else int(known)
    if run:
        facts.summary = runs.load_summary(run)
        facts.config = read_yaml_object(run / runs.CONFIG)
        if (run / runs.ENVIRONMENT).is_file():
            facts.environment = read_json_object(run / runs.ENVIRONMENT)
        facts.scores = list(_scores(run, facts))
    if not whole:
        facts.roles = _roles(place, content)
    return facts


def check_finished(run: Path) -> None:
    """Refuses a run that has no summary, or went on after it was written."""
    runs.load_summary(run)
    if (steps := went_on_from(run)) is not None:
        raise UserError(
            f"the run '{run}' was continued past step {steps}, where its {runs.SUMMARY} ends, and has not finished: "
            "continue it with trainer.resume=auto."
        )


def is_hub_id(name: str) -> bool:
    """Whether a name is an id of the hub, `owner/name`, and not a path."""
    return bool(HUB_ID.fullmatch(name)) and not looks_local(name)


def hub_id_of(source: str) -> str | None:
    """The id of a source on the hub, without its subset and split; None of a path."""
    name = _parted(source)[0].partition(":")[0]
    return name if is_hub_id(name) else None


def is_known(source: str) -> bool:
    """Whether strangers know a source too: it is on the hub, or bundled."""
    return source.startswith(BUNDLED) or hub_id_of(source) is not None


def _parted(source: str) -> tuple[str, str]:
    """`data/train.json (23 examples split off)` as the path and what is said of it."""
    found = PARTED.fullmatch(source)
    assert found is not None
    return found[1], found[2]


def shown_path(text: str) -> str:
    """A text of a run's files as strangers may read it: of a path the last part alone, which names no user."""
    path, note = _parted(text)
    is_path = "/" in path or looks_local(path)
    return (Path(path).name if is_path and not is_known(path) and Path(path).name else path) + note


def shown_words(text: str, paths: Sequence[str] = ()) -> str:
    """A sentence of a run's files as strangers may read it: of each path the last part alone, of URLs no secrets.

    paths: those that it may name, the longest first; others are found where they begin as paths do.
    """

    def last(found: re.Match[str]) -> str:
        return (found[1] or "") + (Path(found[2] or found[0]).name or "…")

    text = re.sub(r"\b\w+://+(?=/)", "", without_secrets(text))  # a path as a URL is one
    for path in paths:
        text = re.sub(rf"{BEFORE_PATH}{re.escape(path)}(?![\w-])", lambda _, name=Path(path).name: name, text)
    folders = {str(folder) for path in paths for folder in Path(path).parents} - {".", "..", "/"}
    for folder in sorted(folders, key=len, reverse=True):  # others lie there too, as the files of a pattern do
        text = re.sub(rf"{BEFORE_PATH}{re.escape(folder)}/", "/" if folder.startswith("/") else "./", text)
    return PATHS.sub(last, text)


def shown_config(facts: Facts) -> dict[str, Any]:
    """The settings that repeat the run: paths by their last part, and no texts of the user's own."""
    local = set(facts.paths)  # of which some read as ids of the hub

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items() if key not in TEXTS}
        if isinstance(value, list):
            return [shown(item) for item in value]
        if isinstance(value, str) and value.partition(":")[0] in local:
            return Path(value).name
        return shown_path(value) if isinstance(value, str) else value

    return {key: shown(value) for key, value in facts.config.items() if key not in NOT_SHOWN}


def _texts(content: Any) -> Iterator[str]:
    """Every text in a configuration but the user's own ones."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from (text for key, part in content.items() if key not in TEXTS for text in _texts(part))
    elif isinstance(content, list):
        yield from (text for part in content for text in _texts(part))


# ---- scores ----


def _scores(run: Path, facts: Facts) -> Iterator[Score]:
    """What the tasks asked for scored, each once; groups first, then their members where there are few."""
    before: dict[str, dict[str, Any]] = {}
    files = {path: read_json_object(path) for path in sorted((run / runs.BEFORE).glob("*.json"))}
    for name, path in runs.chosen_results(files.items()).items():
        before[name] = files[path]["tasks"][name]
    present = adapter_hash(run / runs.ADAPTER)
    files = {path: read_json_object(path) for path in sorted((run / runs.EVAL).glob("*.json"))}
    for path in [path for path in files if runs.is_of_another(files[path], present)]:
        warn(f"{path} is of another adapter than the run has now, so the card leaves it out: evaluate it again.")
        del files[path]
    chosen = runs.chosen_results(files.items())
    evaluated: dict[str, set[str]] = {}
    for name, entry in (each for content in files.values() for each in _tasks(content).items()):
        evaluated.setdefault(name, set()).update(_members(entry))
    learnt = trained_for(facts.config, facts.environment, facts.summary, evaluated)
    for path, content in files.items():
        tasks, asked = _tasks(content), content.get("task")
        names = [asked, *(name for name in tasks if name != asked)] if asked in tasks else list(tasks)
        if len(names) > MEMBERS + 1:
            names = [name for name in names if name == asked]
        for name in names:
            is_asked = name == asked or asked not in tasks
            score = _score(name, tasks[name], before.get(name) or {}, name in learnt, is_asked)
            if score is not None and chosen[name] == path:
                yield score


MEMBERS = 8  # of a group that are shown one by one: MMLU has 57


def _tasks(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("tasks") or {}


def _members(entry: dict[str, Any]) -> list[str]:
    """The tasks of a group, as its scores say; none of a task."""
    known = entry.get("tasks")
    return [str(name) for name in known] if isinstance(known, list) else []


def _score(name: str, entry: dict[str, Any], before: dict[str, Any], learnt: bool, asked: bool) -> Score | None:
    accuracy = number(entry.get("accuracy"))
    if accuracy is None:
        return None
    base = number(entry.get("base"))
    error = number(entry.get("base_stderr"))
    if base is None and all(before.get(key) == entry.get(key) for key in ("samples", "shots", "split")):
        base, error = number(before.get("accuracy")), number(before.get("stderr"))
    data = entry.get("data")
    return Score(
        name,
        accuracy,
        number(entry.get("stderr")),
        entry.get("samples"),
        entry.get("shots"),
        base,
        error,
        number(entry.get("difference_stderr")),
        data if isinstance(data, str) and is_hub_id(data) else None,
        entry.get("split"),
        str(entry.get("metric") or "").partition(",")[0] or None,
        int(number(entry.get("train_overlap")) or 0),
        learnt,
        asked,
    )


# ---- what trains ----


def _roles(folder: Path, content: dict[str, Any]) -> list[Role]:
    """What trains, by the linears' names: counted from the adapter's indices, or the shapes of a LoRA's two sides."""
    if not (folder / ADAPTER_TENSORS).is_file():
        return []
    trained: dict[str, int] = {}
    sizes: dict[str, int] = {}
    modules = content.get("modules")
    with opened(folder / ADAPTER_TENSORS, "adapter") as file:
        for name in file.keys():
            if isinstance(modules, dict):
                module, kind, part = split_name(name, folder / ADAPTER_TENSORS)
                if part == "index":
                    entry, size = modules.get(module), content.get("block_size")
                    shape = tuple(entry.get("shape") or ()) if isinstance(entry, dict) else ()
                    if len(shape) != 2 or (kind == "blocks" and not isinstance(size, int)):
                        raise UserError(
                            f"{folder}: {ADAPTER_CONFIG} does not describe the tensors of {ADAPTER_TENSORS}."
                        )
                    held = trainable_entries(kind, file.get_tensor(name), shape, size)
                    trained[module] = trained.get(module, 0) + held
                    sizes[module] = math.prod(shape)
                continue
            module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
            shape = file.get_slice(name).get_shape()
            trained[module] = trained.get(module, 0) + math.prod(shape)
            if side.startswith(("A.", "B.")):  # (r, in), (out, r)
                sizes[module] = sizes.get(module, 1) * shape[1 if side.startswith("A.") else 0]
    roles: dict[str, Role] = {}
    for module, count in trained.items():
        parts = [part for part in module.split(".") if not part.isdigit()]  # an expert's number
        role = roles.setdefault(parts[-1] if parts else module, Role(parts[-1] if parts else module, 0, 0, 0))
        role.linears += 1
        role.trained += count
        role.weights = None if module not in sizes or role.weights is None else role.weights + sizes[module]
    return sorted(roles.values(), key=lambda role: -role.trained)
