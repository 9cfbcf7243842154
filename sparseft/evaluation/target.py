"""Which model is evaluated: a run's, an adapter's or the base model, and how it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from sparseft.adapters.description import is_adapter, is_whole_model, read_config
from sparseft.adapters.lifecycle import detach, load_adapter, merge, mergeable
from sparseft.compose.run_config import from_dict
from sparseft.config import ModelConfig, RunConfig
from sparseft.console import warn
from sparseft.data.prompts import AS_MESSAGES
from sparseft.data.question_hashes import QuestionHashes
from sparseft.errors import UserError, nearest_path, shown, where_looked
from sparseft.files.hub import adapter_folder
from sparseft.files.untrusted import read_json_object, read_yaml_object
from sparseft.models.loading import check_model_path, has_tokenizer, load_model, load_tokenizer, resolve_device
from sparseft.runs import folder as runs
from sparseft.runs.folder import ADAPTER
from sparseft.runs.metrics import went_on_from


@dataclass
class Target:
    """What is evaluated: a base model, maybe an adapter on it, and where the results go."""

    what: str  # one sentence's subject, as printed and recorded
    model: ModelConfig
    adapter: Path | None
    folder: Path | None  # None: a new folder under outputs/
    base: ModelConfig | None = None  # what a run or an adapter is compared with; None: nothing is
    seen: QuestionHashes | None = None  # questions that it was trained on, where its run's folder knows them
    told: Path | None = None  # the folder that says how it was trained: its run's, or a trimmed adapter's own


def find_target(
    config: RunConfig, *, run: str | None, adapter: str | None, base: bool, overrides: Sequence[str] = ()
) -> Target:
    """Which base model and adapter are meant; model overrides win over what a run or an adapter names."""
    given = [name for name, value in (("--run", run), ("--adapter", adapter), ("--base", base)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them.")
    if base:
        return Target(f"the base model {config.model.path}", config.model, None, None)
    if adapter is not None:
        path = adapter_folder(adapter, "--adapter ")
        if not path.is_dir():
            raise UserError(f"--adapter {adapter}: no such folder{where_looked(adapter)}.{nearest_path(adapter)}")
        if not is_adapter(path) and is_adapter(path / ADAPTER):
            path = path / ADAPTER  # a run folder was given
        return _with_adapter(f"the adapter {adapter}", config, overrides, path, None)
    if run is None and not runs.LATEST.is_symlink() and not runs.LATEST.exists():
        return Target(f"the base model {config.model.path} (there is no run yet)", config.model, None, None)
    folder = runs.find_run(run, for_adapter=True) if run is not None else runs.latest_run()
    latest = "the latest run" if run is None else "the run"
    if not is_adapter(folder / ADAPTER):
        raise UserError(f"{latest} {folder} has no adapter (it did not finish): continue it with trainer.resume=auto.")
    runs.check_own(folder)
    if (steps := went_on_from(folder)) is not None:
        warn(
            f"the run {folder} was continued past step {steps} and has not finished: its adapter is still that of step "
            f"{steps}."
        )
    # Whether to trust remote code, who evaluates decides: not a folder from elsewhere.
    model = dataclasses.replace(from_dict(read_yaml_object(folder / runs.CONFIG)).model, trust_remote_code=False)
    return _with_adapter(f"{latest} {folder}", config, overrides, folder / ADAPTER, folder, model)


def _with_adapter(
    what: str,
    config: RunConfig,
    overrides: Sequence[str],
    path: Path,
    folder: Path | None,
    model: ModelConfig | None = None,
) -> Target:
    content = read_config(path)
    told = folder or _told_in(path.absolute())
    keys = {word.lstrip("+~").partition("=")[0] for word in overrides}
    if model is None:
        own = content.get("sparseft") or {}
        known = content.get("base_model") or own.get("base_model") or content.get("base_model_name_or_path")
        model = config.model if "model" in keys else _loaded_as(told, config.model)
        if not keys & {"model", "model.path"} and not is_whole_model(path):
            if not known:
                raise UserError(f"{path}: the adapter names no base model: give model.path=FOLDER or a hub id.")
            revision = content.get("revision") if known == content.get("base_model_name_or_path") else None
            said = {"revision": revision} if isinstance(revision, str) and revision else {}
            model = dataclasses.replace(model, name="adapter", path=str(known), **said)
        if "model.path" in keys and "model.revision" not in keys:
            model = dataclasses.replace(model, revision=None)  # which is the run's base's
        if model.tokenizer is None and has_tokenizer(path):  # with tokens or a template that the base's lacks
            model = dataclasses.replace(model, tokenizer=str(path))
    elif "model" in keys:
        model = config.model
    changed = {key.removeprefix("model."): None for key in keys if key.startswith("model.")}
    model = dataclasses.replace(model, **{field: getattr(config.model, field) for field in changed})
    seen = QuestionHashes.load(told)
    if is_whole_model(path):
        if keys & {"model", "model.path"}:
            raise UserError(f"{path} is a whole model, so it has no base: leave model and model.path out.")
        tokenizer = model.tokenizer or model.path if folder is not None else config.model.tokenizer
        if "model.tokenizer" not in keys and has_tokenizer(path):
            tokenizer = None
        elif folder is None and tokenizer is None:
            tokenizer = _tokenizer_of_base(path, content)
        # A folder alone does not say what it was before training; a run does.
        base = model if folder is not None else None
        whole = dataclasses.replace(model, path=str(path), tokenizer=tokenizer)
        return Target(what, whole, None, folder, base, seen, told)
    if not keys & {"model", "model.path"}:
        try:
            check_model_path(model.path)
        except UserError as error:  # a folder that was named from elsewhere, say
            raise UserError(f"{error} It is the base of {what}: model.path=FOLDER says where it is now.") from None
    return Target(f"{what} (on {model.path})", model, path, folder, model, seen, told)


def _told_in(adapter: Path) -> Path:
    """The folder that may know how an adapter was trained: that of the run that it lies in, else its own."""
    if adapter.name not in (ADAPTER, runs.UNTRIMMED):
        return adapter
    above = adapter.parent
    if above.parent.name == runs.CHECKPOINTS:
        above = above.parent.parent
    return above if _is_told(above) else adapter


def _is_told(folder: Path) -> bool:
    """Whether a folder has a run's settings; a `config.yaml` alone may be anyone's."""
    return (folder / runs.CONFIG).is_file() and (folder / runs.ENVIRONMENT).is_file()


def _told(folder: Path | None) -> dict[str, Any]:
    """The settings of a run, or what a trimmed adapter says of its run's; empty where neither is known."""
    if folder is not None and _is_told(folder):
        return read_yaml_object(folder / runs.CONFIG)
    said = read_json_object(folder / runs.TRIM).get("run") if folder and (folder / runs.TRIM).is_file() else None
    return said if isinstance(said, dict) else {}


def _loaded_as(folder: Path, given: ModelConfig) -> ModelConfig:
    """`given`, but in the dtype and the like in which the base was trained on, where the folder says it."""
    if not (said := _told(folder)):
        return given
    trained = from_dict(said).model
    return dataclasses.replace(trained, name=given.name, path=given.path, trust_remote_code=given.trust_remote_code)


def _tokenizer_of_base(path: Path, content: dict[str, Any]) -> str:
    """The base that a whole model says it was trained from, for a tokenizer that the folder itself lacks."""
    base = content.get("base_model")
    try:
        if isinstance(base, str) and base:
            check_model_path(base)
            return base
        where = "it names no base"
    except UserError:
        where = f"its base {shown(base)} is not there"
    raise UserError(f"{path} has no tokenizer, and {where}: give model.tokenizer=FOLDER or a hub id.")


def load_target(target: Target, config: RunConfig) -> tuple[Any, Any]:
    """The model with its adapter in the weights, and the tokenizer."""
    transformers.logging.disable_progress_bar()
    device = resolve_device(config.hardware.device)
    tokenizer = load_tokenizer(target.model)
    model = load_model(target.model, device)
    if target.adapter is not None:
        model = load_adapter(model, target.adapter)
    return model.eval(), tokenizer


def score_both(
    target: Target,
    config: RunConfig,
    score: Callable[[Any, Any], dict[str, Any]],
    asked: Callable[[str], None] = lambda who: None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What `score(model, tokenizer)` makes of the target, and of its base where that is to be compared. `asked(who)`
    is called before each: "base", "adapter" or "model".

    An adapter is loaded first, so that one that does not fit is refused before hours of work, and detached for the
    base, which is then the plain model that the base alone is. Whole models are loaded one after the other.
    """
    compared = target.base is not None and config.eval.compare_base
    model, tokenizer = load_target(target, config)
    if target.adapter is None:
        asked("model")
        outcome = score(model, tokenizer)
        if not compared:
            return outcome, None
        del model  # two at once may not fit
        loaded = load_target(Target("", target.base, None, None), config)
        asked("base")
        return outcome, score(*loaded)
    of_base = None
    if compared:
        model = detach(model)
        asked("base")
        of_base = score(model, tokenizer)
        model = load_adapter(model, target.adapter).eval()
    if mergeable(model):
        model = merge(model)  # else every layer of LoRA would compute its low-rank product beside the dense one
    asked("adapter")
    return score(model, tokenizer), of_base


def data_format(run: Path | None) -> str | None:
    """The format of the data that a run (or a trimmed adapter's) was trained on; None where that is not known."""
    if run is None or not (run / runs.ENVIRONMENT).is_file():
        return (_told(run).get("dataset") or {}).get("format")
    return (read_json_object(run / runs.ENVIRONMENT).get("data") or {}).get("format")


def prompt_format(wanted: str, run: Path | None) -> str:
    """`eval.prompt`, with `auto` the format that the run was trained on where that is a conversation's."""
    if wanted != "auto":
        return wanted
    messages = "plain" if _plain_chat(run) else AS_MESSAGES
    known = {"alpaca": "alpaca", "guanaco": "guanaco", "oasst_trees": "guanaco", "messages": messages}
    return known.get(str(data_format(run)), "auto")


def _plain_chat(run: Path | None) -> bool:
    """Whether a run wrote chats without the template (`dataset.plain_chat`)."""
    return bool((_told(run).get("dataset") or {}).get("plain_chat"))
