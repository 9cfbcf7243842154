"""From `conf/`, the command line and `config.yaml` to a checked `RunConfig`.

Hydra composes the groups (`model=llama3-8b`, experiments, defaults lists); the settings on the command line are written
over the result once their keys are known to exist. Hydra is imported inside functions: `sparseft --help` stays fast.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseft.compose import overrides as words
from sparseft.compose import validation
from sparseft.compose.overrides import GROUPS, Override
from sparseft.compose.validation import annotation_of, check_key, known_keys, method_fields
from sparseft.config import BUNDLED, OBJECTIVES, DatasetConfig, RunConfig
from sparseft.console import warn
from sparseft.errors import UserError, local_name, nearest
from sparseft.methods import METHODS, get_method
from sparseft.methods.base import SHARED
from sparseft.rules import check_type, is_optional, is_text, show

COMMANDS = ("train", "preprocess", "eval", "chat", "export", "trim", "bench")
PREFERENCES = "preference"  # the data set of the preference objectives
OWN_DATA = "json"  # the option of the group dataset that is of no family
OWN_DATA_KEYS = ("dataset.train_path", "dataset.mix", "dataset.hub_path")
KTO_STEP = {"batch_size": 4, "gradient_accumulation": 4}  # it needs two answers at once; a step is of 16 as ever

_COMPOSED: dict[tuple[Any, ...], tuple[Any, dict[str, str]]] = {}  # of `_composed` where only shipped files take part

# Text that other YAML readers (YAML 1.2, OmegaConf) would take for a number: written with quotes.
_NUMBER_LIKE = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


def conf_dir() -> Path:
    """The folder of the shipped YAML files: `sparseft/conf` in a wheel, the repository's `conf/` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"the installation is incomplete: no conf/train.yaml in or beside {package}")


def options(group: str, config_dirs: Sequence[str] = ()) -> list[str]:
    """The options of a group, the user's own included, sorted: `["dora", "full", …]`."""
    names = set()
    for folder in (conf_dir(), *map(Path, config_dirs)):
        for path in (folder / group).rglob("*.yaml"):
            if not path.name.startswith("_"):
                names.add(path.relative_to(folder / group).with_suffix("").as_posix())
    return sorted(names)


def compose(command: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> RunConfig:
    """One run from `conf/<command>.yaml`, the groups chosen and the settings on the command line.

    command: one of `COMMANDS`.
    overrides: words as typed (`model=tiny`, `trainer.max_steps=5`, `+experiment=quickstart`, `~scope`); the last of
        two that set the same key counts.
    config_dirs: folders of the user's own YAML files (`DIR/model/mine.yaml`).

    Raises `UserError` for whatever is unknown, of the wrong type, out of range or contradictory.
    """
    from omegaconf import OmegaConf

    assert command in COMMANDS
    choices, settings = _sort_words(overrides, config_dirs)
    typed = settings.get("objective")
    objective = words.text_value(typed) if typed is not None and typed.value is not None else None
    if objective in OBJECTIVES[1:] and "experiment" not in choices:
        choices.setdefault("dataset", PREFERENCES)  # the others have no pairs
    config = _compose_groups(command, choices, config_dirs)
    method_name = _method_name(config)
    keys = known_keys(method_name)
    for override in settings.values():
        check_key(override, keys, method_name)
    _apply(config, settings, keys)
    _name_data(config, choices, settings)
    with _hydra_errors():
        content: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if objective == "kto" and "experiment" not in choices:
        content["trainer"] |= {name: value for name, value in KTO_STEP.items() if f"trainer.{name}" not in settings}
    if "method.dropout" not in settings:
        _turn_dropout_off(content, method_name)
    _share(content, settings, method_name)
    built = _build(content, " in the configuration files")
    bundled = built.model.path.startswith(BUNDLED)
    if built.dataset.mix:
        built.dataset.mix = [_with_own_data(text, bundled, config_dirs) for text in built.dataset.mix]
    if built.dataset.replay:
        built.dataset.replay = _with_own_data(built.dataset.replay, bundled, config_dirs)
    return built


def points(command: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[list[str]]:
    """The points of a `--multirun`, each a list of words for `compose`; a single point if nothing is swept.

    `a,b`, `choice(a,b)`, `range(1,4)` and, for groups, `glob(*)`. In a text field a comma separates two values unless
    the value is quoted.
    """
    assert command in COMMANDS
    keys = known_keys()
    for name in METHODS:  # the method itself may be swept, so its keys are those of any
        for field, hint in method_fields(name).items():
            keys.setdefault(f"method.{field}", hint)
    _check_config_dirs(config_dirs)
    return words.expand(
        list(overrides), lambda key: annotation_of(key, keys), lambda group: options(group, config_dirs)
    )


def from_dict(content: dict[str, Any]) -> RunConfig:
    """A run from the content of its `config.yaml`; what is missing there keeps its default.

    Raises `UserError` as `compose` does.
    """
    if not isinstance(content, dict):
        raise UserError(f"a configuration is a group of settings, not '{show(content)}'.")
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    _rename(content)
    method_name = _method_name(content)
    _turn_dropout_off(content, method_name)
    method = content["method"]
    for field in SHARED:
        top, own = content.get(field), method.get(field)
        if field not in method_fields(method_name) or top is None:
            continue
        if field != "seed" and own is not None and own != top:
            raise UserError(_contradiction(field, top, own))
        method.setdefault(field, top)
        if method[field] is None:
            method[field] = top
    return _build(content, " in the configuration")


def _rename(content: dict[str, Any]) -> None:
    """Settings of older runs under their present names, in place."""
    hardware = content.get("hardware")
    compiled = hardware.pop("compile", None) if isinstance(hardware, dict) else None
    if compiled is not None and isinstance(content.setdefault("trainer", {}), dict):
        content["trainer"].setdefault("compile", "model" if compiled is True else "none")


def _turn_dropout_off(content: dict[str, Any], method_name: str) -> None:
    """Of a preference objective, in place: TRL turns it off, also in runs of earlier versions, which say a number."""
    if content.get("objective") in OBJECTIVES[1:] and "dropout" in method_fields(method_name):
        content["method"]["dropout"] = 0.0


def to_yaml(config: RunConfig) -> str:
    """The run as `config.yaml` holds it; `from_dict` of what a YAML reader makes of it gives the run back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = '"' if not text.isprintable() else "'" if _NUMBER_LIKE.fullmatch(text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    return yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=4096)


def _sort_words(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[dict[str, str], dict[str, Override]]:
    """The chosen option of each group, and the settings by key."""
    _check_config_dirs(config_dirs)
    choices: dict[str, str] = {}
    settings: dict[str, Override] = {}
    mixes: list[Override] = []  # those of dataset=[…]
    for word in overrides:
        override = words.parse(word)
        if override.key not in GROUPS:
            settings.pop(override.key, None)  # so that the last word comes last
            settings[override.key] = override
            continue
        group = override.key
        if group == "experiment" and override.value in {None, "null"}:
            choices.pop(group, None)  # none is the default
            continue
        if override.value is None:
            raise UserError(f"{word}: a {group} is always needed, it cannot be removed; choose one with {group}=NAME.")
        available = options(group, config_dirs)
        if group == "dataset" and override.value.startswith("[") and override.value.endswith("]"):
            choices[group] = OWN_DATA  # whose settings are the plain ones: each source has a format of its own
            settings["dataset.mix"] = words.parse(f"dataset.mix={override.value}")
            mixes.append(settings["dataset.mix"])
            continue
        if group == "dataset" and settings.get("dataset.mix") in mixes:
            del settings["dataset.mix"]  # the last word counts
        name = words.unquote(override.value) or override.value.strip()
        if name not in available:
            raise UserError(_unknown_option(group, name, available))
        choices[group] = name
    return choices, settings


def _with_own_data(text: str, bundled: bool, config_dirs: Sequence[str]) -> str:
    """`SOURCE:SHARE` with a data set's own file or hub id in the place of its name; a bundled one keeps its name."""
    name, colon, share = text.partition(":")
    if name not in options("dataset", config_dirs):
        return text
    own = _compose_groups("train", {"dataset": name}, config_dirs)["dataset"]
    path = own.get("train_path") or (None if bundled else own.get("hub_path"))
    return f"{path}{colon}{share}" if path else text


def _unknown_option(group: str, name: str, available: list[str]) -> str:
    if name and all(part.strip() in available for part in name.split(",")):
        return f"{group}={name}: several values make a sweep, add --multirun."
    message = f"Unknown {group} '{name}' in {group}={name}.{nearest(name, available)}"
    if group == "model":
        message += " Any Hugging Face id or folder goes into model.path=…"
    elif group == "dataset":
        message += " Your own file: dataset=json dataset.train_path=FILE"
    return message


def _check_config_dirs(config_dirs: Sequence[str]) -> None:
    """Refuses folders that are missing, and files that would hide behind a shipped one of the same name."""
    shipped = conf_dir()
    for folder in map(Path, config_dirs):
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder.")
        for group in GROUPS:
            for path in sorted((folder / group).rglob("*.yaml")):
                relative = path.relative_to(folder)
                if folder.resolve() != shipped and (shipped / relative).is_file():
                    raise UserError(f"{path}: sparseft ships a {group} of that name; give the file another one.")


@contextlib.contextmanager
def _hydra_errors(config_dirs: Sequence[str] = ()) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML refuse into one sentence, without Hydra's advice to add a `+`."""
    import yaml
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        name = str(error.missing_cfg_file or "")
        group, _, option = name.rpartition("/")
        known = options(group, config_dirs) if group in GROUPS else []
        origin = re.match(r"In '([^']+)'", str(error))
        where = f" that {origin[1]} asks for" if origin else ""
        raise UserError(f"No configuration file '{name}.yaml'{where}.{nearest(option, known)}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
        raise UserError(f"{place}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Hydra's own error says nothing of OmegaConf's, nor that it was no error
            cause = cause.__cause__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        said = next((each for each in (error, cause) if str(each).strip()), cause)
        message = (str(said).strip() or type(said).__name__).splitlines()[0]
        key = getattr(said, "full_key", None)
        raise UserError(f"The configuration cannot be composed{f' at {key}' if key else ''}: {message}") from error


def _compose_groups(command: str, choices: dict[str, str], config_dirs: Sequence[str]) -> Any:
    """Hydra's part: the composed DictConfig, without the settings on the command line.

    An option that is chosen beside an experiment takes the place of the experiment's whole section, unless it is the
    experiment's own.
    """
    config, _ = _composed(command, choices, config_dirs)
    typed = {group: option for group, option in choices.items() if group != "experiment"}
    if typed and "experiment" in choices:
        experiment, its_options = _composed(command, {"experiment": choices["experiment"]}, config_dirs)
        options_alone, _ = _composed(command, typed, config_dirs)
        _, defaults = _composed(command, {}, config_dirs)
        for group, option in typed.items():
            own, section = its_options.get(group), experiment.get(group)
            if own == defaults.get(group):  # a run's `config.yaml` chooses none, its section says which it was
                own = section.get("name") if hasattr(section, "get") else None
                own = own or (DatasetConfig.name if group == "dataset" else None)  # conf/dataset/_unchosen.yaml
            if option != own:
                config[group] = options_alone.get(group, {})
    return config


def _composed(command: str, choices: dict[str, str], config_dirs: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The DictConfig as Hydra composes it, and each group's option; kept where no file but shipped ones takes part."""
    key = (conf_dir(), command, tuple(choices.items()))
    if config_dirs or key not in _COMPOSED:
        from omegaconf import OmegaConf

        config = _by_hydra(command, choices, config_dirs)
        OmegaConf.set_struct(config, False)  # a user's own file may leave out settings, the dataclass has defaults
        found = config, dict(config.hydra.runtime.choices)
        del config["hydra"]
        if config_dirs:
            return found
        _COMPOSED[key] = found
    return copy.deepcopy(_COMPOSED[key])


def _by_hydra(command: str, choices: dict[str, str], config_dirs: Sequence[str]) -> Any:
    """What Hydra composes, its own node `hydra` included."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.types import Quote, QuotedString

    def quoted(text: str) -> str:
        return QuotedString(text, Quote.single).with_quotes()

    group_words = [f"{group}={quoted(option)}" for group, option in choices.items()]
    if config_dirs:
        folders = ",".join(quoted(f"file://{Path(folder).resolve()}") for folder in config_dirs)
        group_words.append(f"hydra.searchpath=[{folders}]")
    previous = GlobalHydra.instance().hydra  # a program that uses Hydra itself gets its state back
    GlobalHydra.instance().clear()
    try:
        with (
            _hydra_errors(config_dirs),
            initialize_config_dir(config_dir=str(conf_dir()), job_name="sparseft", version_base="1.3"),
        ):
            return hydra_compose(command, group_words, return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()
        if previous is not None:
            GlobalHydra.instance().initialize(previous)


def _method_name(config: Any) -> str:
    """The name in the `method` section; a `UserError` if it is missing or unknown."""
    method = config.get("method")
    name = method.get("name") if hasattr(method, "get") else None
    if name is None:
        raise UserError(f"method.name is missing: expected one of {', '.join(METHODS)}.")
    if name not in METHODS:
        raise UserError(f"Unknown method '{name}' in method.name.{nearest(str(name), METHODS)}")
    return name


def _apply(config: Any, settings: dict[str, Override], keys: dict[str, Any]) -> None:
    """Writes the settings over the composed config, in place."""
    from omegaconf import OmegaConf

    for key, override in settings.items():
        if key == "method.name":
            continue
        annotation = annotation_of(key, keys)
        if override.value is None and key not in keys:
            raise UserError(f"{override.word}: an entry of {key.rpartition('.')[0]} is left out by not giving it.")
        if override.value is None:
            if not is_optional(annotation):
                raise UserError(f"{override.word}: {key} is always needed, it cannot be removed.")
            value = None
        elif is_text(annotation):
            value = words.text_value(override)
        else:
            value = words.parsed_value(override, annotation)
        with _hydra_errors():
            OmegaConf.update(config, key, value, merge=False)


def _name_data(config: Any, choices: dict[str, str], settings: dict[str, Override]) -> None:
    """Says of what family the data are where nobody has, in place: data of one's own of none. Those on the command line
    are not of the family that an experiment has chosen for its own."""
    from omegaconf import OmegaConf

    data = config.get("dataset")
    if not OmegaConf.is_dict(data) or "dataset.name" in settings:
        return
    with _hydra_errors():
        own = data.get("train_path") or data.get("mix") or "dataset.hub_path" in settings
        typed = "dataset" not in choices and not settings.keys().isdisjoint(OWN_DATA_KEYS)
        if data.get("name") is None or (own and typed):
            data["name"] = OWN_DATA if own else DatasetConfig.name


def _share(content: dict[str, Any], settings: dict[str, Override], method_name: str) -> None:
    """Passes `sparsity`, `scope` and `seed` on to the method, in place.

    What is nearest to the user wins: a key on the command line over one in a file, and among files the method's own
    value. Two that contradict each other are refused, except for the seed, where a
    selection may well have another seed than the training.
    """
    method = content["method"]
    hints = method_fields(method_name)
    for field in SHARED:
        if field in content:
            content[field] = check_type(field, content[field], validation.run_fields()[field])
        top = content.get(field)
        if field not in hints:
            if field != "seed" and top is not None:
                warn(f"{field}={top} has no effect: method={method_name} has no such setting.")
            continue
        own = method.get(field)  # a file's own seed is one: those of conf/method/ are the run's
        top_typed, own_typed = field in settings, f"method.{field}" in settings
        own_set = own is not None and (own_typed or not top_typed)
        if top is None:
            if top_typed and not own_typed:
                method[field] = None  # scope=null: every linear; sparsity=null: the method's own; whatever files say
            continue
        if not own_set:
            method[field] = top
        elif own != top and field != "seed":
            if own_typed and not top_typed:
                content[field] = own
            else:
                raise UserError(_contradiction(field, top, own))


def _contradiction(field: str, top: Any, own: Any) -> str:
    return f"{field}={show(top)} and method.{field}={show(own)} contradict each other: give one."


def _build(content: dict[str, Any], source: str) -> RunConfig:
    """The dataclasses from plain containers, every value checked."""
    method_name = _method_name(content)
    run_hints = validation.run_fields()
    allowed = [*validation.SECTIONS, "method", *run_hints]
    values: dict[str, Any] = {"method_name": method_name}
    for key, value in content.items():
        if key == "experiment" and isinstance(value, dict):
            raise UserError(
                f"Unknown key 'experiment'{source}: an experiment file starts with the line '# @package _global_'."
            )
        if key not in allowed:
            raise UserError(f"Unknown key '{key}'{source}.{nearest(str(key), allowed)}")
        if key == "dataset" and isinstance(value, dict):
            value = value | {name: _shares(value[name]) for name in ("mix", "replay") if name in value}
        if key in validation.SECTIONS:
            values[key] = validation.build(validation.SECTIONS[key], value, key, source)
        elif key == "method":
            fields = {name: entry for name, entry in value.items() if name != "name"}
            values[key] = validation.build(get_method(method_name), fields, key, source)
        else:
            values[key] = check_type(key, value, run_hints[key])
    for section in ("model", "dataset"):
        values.setdefault(section, validation.SECTIONS[section]())
    config = RunConfig(**values)
    validation.check(config)
    for key in ("path", "tokenizer"):  # a run's files are read elsewhere too
        if (name := getattr(config.model, key)) and os.path.isdir(name):
            setattr(config.model, key, local_name(name))
    return config


def _shares(value: Any) -> Any:
    """`{source: share}`, and a list of such, as `source:share`: so YAML reads `- my.jsonl: 0.7`."""
    if isinstance(value, dict):
        spelt = [f"{source}:{share}" for source, share in value.items()]
        return spelt[0] if len(spelt) == 1 else spelt
    return [_shares(each) for each in value] if isinstance(value, list) else value
