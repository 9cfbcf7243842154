"""Runs a command: composes its configuration, or each point of a sweep, and prints what comes of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparseft import console
from sparseft.cli.libraries import load
from sparseft.cli.outcome import FAILED, INTERRUPTED, Outcome, emit, execute, to_json
from sparseft.compose.overrides import GROUPS, is_override
from sparseft.compose.validation import known_keys, method_fields, nearest_key
from sparseft.errors import UserError
from sparseft.methods import METHODS


@dataclass
class Options:
    """What every command that composes a configuration takes."""

    multirun: bool
    cfg: bool
    config_dir: list[str] | None
    json: bool
    debug: bool
    quiet: bool = False


def is_setting(name: str) -> bool:
    return name in GROUPS or name.startswith("method.") or name in known_keys()


def nearest_setting(command: str, name: str) -> str:
    """`" Did you mean 'trainer.learning_rate'?"` for the setting of a command that an option was meant for; nothing
    where none is near."""
    own = {"trainer", *GROUPS, command}  # eval, chat and bench have settings of their own
    keys = {key: hint for key, hint in known_keys().items() if "." not in key or key.partition(".")[0] in own}
    for method in METHODS:
        keys |= {f"method.{field}": hint for field, hint in method_fields(method).items()}
    found = nearest_key(name.replace("-", "_"), keys)
    return found if found.startswith(" Did you mean") else ""


def configured(
    command: str,
    words: list[str],
    options: Options,
    call: Callable[[Any, Any, list[str]], dict[str, Any]],
    check: Callable[[], None] = lambda: None,
    module: str | None = None,
) -> int:
    """Composes one run, or each point of a sweep, and hands it to the command's module.

    call: (module, config, words of the point) -> the result.
    check: refuses wrong options before anything else happens; may add to `words`.
    module: the one of `commands/` that works and renders, where it is not the command's own.
    """
    from sparseft.compose import run_config as compose

    module, folders = module or command, options.config_dir or []

    def expand() -> list[list[str]]:
        check()
        for word in words:
            if not is_override(word):
                hint = f" Did you mean {word}=…?" if is_setting(word) else _of_file(word)
                raise UserError(f"'{word}' is not a setting: expected key=value.{hint}")
        return compose.points(command, words, folders) if options.multirun else [list(words)]

    def run_point(index: int, point: list[str]) -> Outcome:
        def work() -> Any:
            config = compose.compose(command, point, folders)
            swept = [new for new, old in zip(point, words, strict=True) if new != old]
            place = next((word for word in swept if word.startswith("output_dir=")), None)
            shared = place is None or sum(place in other for other in expanded.result) > 1
            if options.multirun and config.output_dir is not None and shared:
                config.output_dir = os.path.join(config.output_dir, str(index))
                point.append(f"output_dir={config.output_dir}")
            if options.cfg:
                return config.to_dict() if options.json else compose.to_yaml(config)
            with console.working("loading libraries", logged=False):
                found = command_module(module)
            return call(found, config, point)

        outcome = execute(work, options.debug)
        return outcome if options.cfg else _judged(module, outcome)

    with console.quiet() if options.quiet else contextlib.nullcontext():
        expanded = execute(expand, options.debug)
        if expanded.code:
            return finish(module, expanded, options.json, options.debug)
        if options.multirun:
            with console.once("data: ", "model: "):  # what the points share; what comes of it, each says for itself
                return _sweep(module, words, expanded.result, run_point, options)
        return finish(module, run_point(0, expanded.result[0]), options.json, options.debug, options.cfg)


def _of_file(word: str) -> str:
    """How the settings of a YAML file are given; nothing where the word names none."""
    stem, suffix = os.path.splitext(os.path.basename(word))
    if suffix not in (".yaml", ".yml"):
        return ""
    return f" A file of settings is an experiment: as DIR/experiment/{stem}.yaml, --config-dir DIR experiment={stem}."


def _sweep(
    command: str,
    words: list[str],
    points: list[list[str]],
    run_point: Callable[[int, list[str]], Outcome],
    options: Options,
) -> int:
    """Runs the points one after another, going on past a failing one; returns the worst exit code."""
    outcomes: list[tuple[list[str], Outcome]] = []
    for index, point in enumerate(points):
        swept = [new for new, old in zip(point, words, strict=True) if new != old]
        console.log(f"point {index} ({index + 1} of {len(points)}): {' '.join(swept)}")
        outcome = run_point(index, point)
        if options.cfg and not options.json and not outcome.code:
            emit(f"--- # point {index}: {' '.join(swept)}")
        if outcome.code or not options.json:  # with --json the results come together, at the end
            outcome.code = finish(command, outcome, options.json, options.debug, options.cfg)
        outcomes.append((swept, outcome))
        if outcome.code == INTERRUPTED:
            break
    if options.json:
        listed = [
            {"point": index, "overrides": swept, "exit_code": outcome.code}
            | ({"error": outcome.message} if outcome.code else {})
            | ({"result": outcome.result} if outcome.result is not None else {})
            for index, (swept, outcome) in enumerate(outcomes)
        ]
        emit(to_json({"points": listed}))
    elif not options.cfg:
        for index, (swept, outcome) in enumerate(outcomes):
            folder = outcome.result.get("run") if isinstance(outcome.result, dict) else None
            done = f"done, {folder}" if folder else "done"
            state = done if outcome.code == 0 else f"failed with exit code {outcome.code}: {outcome.message}"
            emit(f"point {index}: {' '.join([*swept, state])}")
    return max(outcome.code for _, outcome in outcomes)


def finish(command: str, outcome: Outcome, as_json: bool, debug: bool, shows_config: bool = False) -> int:
    """Prints the result, the error, or both of one run and returns the exit code."""
    result = outcome.result
    if outcome.code == 0 or result is not None:
        if as_json:
            printed = execute(lambda: emit(to_json(result)), debug, guard_stdout=False)
        elif shows_config:
            printed = execute(lambda: emit(result.rstrip("\n")), debug, guard_stdout=False)
        else:
            printed = execute(lambda: command_module(command).render(result), debug, guard_stdout=False)
        if printed.code:
            outcome = printed
    if outcome.code and outcome.message:
        console.error(outcome.message)
    return outcome.code


def _judged(command: str, outcome: Outcome) -> Outcome:
    """The outcome, failed where the command's module says so of its result (`failure`); the result is still printed."""
    failure = None if outcome.code else getattr(command_module(command), "failure", None)
    message = failure(outcome.result) if failure else None
    return Outcome(FAILED, outcome.result, message) if message else outcome


def command_module(name: str) -> Any:
    """The module of a command, which is imported only where it is used."""
    return load(f"sparseft.commands.{name}")
