"""Writes docs/configuration.md: every setting with its default, what it may hold and what it means.

    python scripts/config_reference.py            # writes the page
    python scripts/config_reference.py --check    # exit code 1 where the page is not what conf/ and config.py say now

Meanings are the comments of conf/**/*.yaml, defaults and values those of the dataclasses.
"""

from __future__ import annotations

import itertools
import re
import sys
import typing
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from sparseft.compose.run_config import conf_dir, options
from sparseft.compose.validation import SECTIONS, run_fields
from sparseft.config import RunConfig
from sparseft.methods import METHODS, get_method
from sparseft.rules import Rule, alternatives, describe, field_types, show

OF_TRAINING = {"eval": ", and of training with a `trainer.eval_task`"}  # a section of two commands
PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRO = """# Every setting

<!-- Written by scripts/config_reference.py from conf/ and the dataclasses: change those, and run it. -->

A setting is an override, `key=value`, in any order with a command's options; a group is chosen by `group=option`. Later
words win over earlier ones, the command line over an experiment, an experiment over the rest. An option that is chosen
beside an experiment, and is not the experiment's own, takes the place of all that it sets in that section:
`experiment=quickstart method=lora` has LoRA's defaults. So it is with the experiments that `bench front`, `time` and
others take by themselves: beside `dataset=…` give `dataset.eval_fraction` too. `sparseft train --cfg` prints what a
command line comes to and runs nothing.

```
sparseft train method=s2ft sparsity=0.95 trainer.max_steps=100 --cfg
```

Your own files go beside these: `--config-dir DIR` with `DIR/model/mine.yaml`, `DIR/experiment/mine.yaml` and so on.

## A run again

The command line of a run is in its `environment.json`, what it came to in its `config.yaml`, with every default written
out. With these lines above it (and the run's own method) that file is an experiment, here `DIR/experiment/again.yaml`:

```yaml
# @package _global_
defaults:
  - override /method: s2ft
```

<!-- shape -->
```
sparseft train --config-dir DIR experiment=again output_dir=outputs/again
```

The first line belongs at the head of every experiment; options of groups stand under `defaults`, as
`override /GROUP: OPTION`.
"""

GROUPS = {
    "model": "A name for a model; `model.path=` takes any Hugging Face id or folder instead.",
    "dataset": "A family of data; `dataset.train_path=` names a file or a hub id.",
    "hardware": "Devices and processes ([several processes](distributed.md)).",
}

KEY = re.compile(r"(\s*)(\w+):(?: +([^#\s].*?))?(?: +# ?(.*))?$")
SETTING = re.compile(
    r"(?<![\w`./])((?:model|dataset|method|trainer|hardware|eval|bench)(?:\.[a-z]\w*)+(?:=[\w.]*\w)?)(?![\w/])"
)
BRACES = re.compile(r"\{[^}]*\}")  # in braces the site's Markdown would see attributes of the cell


def comments(path: Path) -> dict[str, str]:
    """What a YAML file says of each key: the comment in its line and below it, and those right above it."""
    found: dict[str, str] = {}
    section, above, last = "", [], None
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines[len(heading_lines(path)) :]:
        text = line.strip()
        if text.startswith("#"):
            if last and len(line) - len(line.lstrip()) > 4:  # under the comment that it goes on with
                found[last] += " " + text.removeprefix("#").strip()
            else:
                above.append(text.removeprefix("#").strip())
            continue
        match = KEY.match(line)
        last = None
        if match:
            indent, key, value, comment = match.groups()
            section = section if indent else key
            last = f"{section}.{key}" if indent else key
            found[last] = " ".join([*above, *([comment] if comment else [])])
        above = []
    return found


def heading_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def heading(path: Path) -> str:
    """What stands at the top of a YAML file, as one line."""
    lines = [line.removeprefix("#").strip() for line in heading_lines(path)]
    return cell(" ".join(line for line in lines if not line.startswith("@package")))


def values(annotation: Any) -> str:
    """What a field may hold: its choices by name, else its type and range."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{show(value)}`" for value in arguments)
    if origin is Annotated and len(alternatives(annotation)) > 1:
        return describe(annotation)
    if origin is Annotated:
        rules = [rule.expected for rule in arguments[1:] if isinstance(rule, Rule)]
        inner = values(arguments[0])
        return rules[0] if rules and rules[0].startswith(("a ", "an ", "0 ")) else ", ".join([inner, *rules])
    if origin is list:
        return f"a list: {values(arguments[0])}"
    parts = [argument for argument in arguments if argument is not type(None)]
    if len(parts) < len(arguments):  # what null means stands in the description
        return " or ".join(map(values, parts))
    return "anything" if annotation is Any else describe(annotation)


# What a method refuses of what its fields may hold.
NARROWER = {("losia", "allocation"): "`per_layer`", ("losia", "exclude"): "`null`"}


def default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def cell(text: str) -> str:
    parts = re.split("(`[^`]*`)", text)  # what is code already stays as it is
    parts[::2] = [SETTING.sub(r"`\1`", BRACES.sub(r"`\g<0>`", part)) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|").replace("<", "&lt;").replace("*_", r"\*_")


def table(prefix: str, config_class: type, meanings: dict[str, str], below: str = "") -> list[str]:
    """Rows of one dataclass; `below`: the section under which `meanings` has its keys."""
    rows = ["| setting | default | meaning | may be |", "| --- | --- | --- | --- |"]
    hints = field_types(config_class)
    for entry in fields(config_class):
        if config_class is RunConfig and entry.name not in run_fields():
            continue
        key = f"{below}.{entry.name}" if below else entry.name
        if not meanings.get(key):
            raise SystemExit(f"conf/ says nothing of {prefix}{entry.name}")
        shown = show(default(entry)).replace("|", r"\|")
        may_be = NARROWER.get((getattr(config_class, "name", ""), entry.name)) or values(hints[entry.name])
        row = [f"`{prefix}{entry.name}`", f"`{shown}`", cell(meanings[key]), cell(may_be)]
        rows.append("| " + " | ".join(row) + " |")
    return rows


def page() -> str:
    conf = conf_dir()
    base = comments(conf / "_base.yaml")
    lines = [INTRO, "## Of the run", "", *table("", RunConfig, base)]
    lines += ["", "## `trainer`", "", *table("trainer.", SECTIONS["trainer"], base, "trainer")]
    lines += ["", "## `method`", "", "Chosen by `method=NAME`; [what each trains](methods.md)."]
    for name in METHODS:
        path = conf / "method" / f"{name}.yaml"
        lines += ["", f"### `method={name}`", "", heading(path), ""]
        shared = comments(path.with_name("_sparse.yaml")) if get_method(name).sparse else {}
        lines += table("method.", get_method(name), shared | comments(path))
    for group, text in GROUPS.items():
        lines += ["", f"## `{group}`", "", text, ""]
        lines += table(f"{group}.", SECTIONS[group], comments(conf / group / "_defaults.yaml"))
        lines += ["", "Options: " + ", ".join(f"`{group}={name}`" for name in options(group)) + "."]
    for section in [name for name in SECTIONS if name not in (*GROUPS, "trainer")]:
        lines += ["", f"## `{section}`", "", f"Of `sparseft {section}`{OF_TRAINING.get(section, ' alone')}.", ""]
        lines += table(f"{section}.", SECTIONS[section], base, section)
    lines += ["", "## `experiment`", "", "Settings that belong together, chosen by `experiment=NAME`.", ""]
    lines += ["| option | what |", "| --- | --- |"]
    for name in options("experiment"):
        lines.append(f"| `{name}` | {heading(conf / 'experiment' / f'{name}.yaml')} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    if words not in ([], ["--check"]):
        print("usage: python scripts/config_reference.py [--check]", file=sys.stderr)
        return 2
    text = page()
    if not words:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what conf/ says now: run python scripts/config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
