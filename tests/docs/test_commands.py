"""Every command and every piece of Python that README.md and docs/ show: it composes, and what can run here does."""

from __future__ import annotations

import ast
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import sparseft
from sparseft.cli.app import BENCHMARKS, app
from sparseft.compose import run_config as compose
from sparseft.compose.overrides import GROUPS, is_override, parse
from sparseft.compose.validation import annotation_of, known_keys, method_fields
from sparseft.evaluation.tasks import own_names
from sparseft.export.engines import ENGINES
from sparseft.export.formats import FORMATS
from sparseft.methods import METHODS, get_method
from sparseft.training.resume import FREE
from support.documents import Block, Command, blocks, commands, inline_commands, named, python_blocks
from support.models import build_model
from support.places import ROOT
from support.running import sparseft as run

COMMANDS = typer.main.get_command(app).commands
MARKS = re.compile(r"(needs: \S.*|shape|written by .*)?")
DOCUMENTED = [command for command in commands() if command.words[1:2]]
TARGETS = re.findall(r"^\.PHONY: ([\w-]+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(DOCUMENTED) > 30
    assert {command.words[1] for command in DOCUMENTED if command.words[0] == "sparseft"} >= {"train", "eval", "export"}


@pytest.mark.parametrize("command", named(DOCUMENTED))
def test_a_command_composes(command: Command) -> None:
    """Options, keys, groups, tasks, formats and targets exist, and values are of the right kind. Nothing runs."""
    assert MARKS.fullmatch(command.mark), f"{command.place}: {command.mark}"
    program, *rest = command.words
    if program == "make":
        assert rest[0] in TARGETS
    elif program == "sparseft" and command.mark != "shape":
        composes(rest)
    elif program == "sparseft":
        has_options(command.offered[1:])
    else:
        assert (ROOT / (rest[0] if program == "python" else program)).is_file()


@pytest.mark.parametrize("command", named(inline_commands()))
def test_a_command_within_text_has_its_options(command: Command) -> None:
    has_options(command.offered[1:])


def composes(words: list[str]) -> None:
    name, *rest = words
    given = COMMANDS[name].make_context(name, list(rest)).params
    free = given.get("words") or given.get("runs") or []
    overrides = [word for word in free if is_override(word)]
    others = [word for word in free if not is_override(word)]
    if name == "eval":
        assert set(others) <= set(own_names()), "not a task of ours"
    if name == "bench":
        assert set(others) <= set(BENCHMARKS)
    if name == "export":
        assert given["format"] in FORMATS and given["engine"] in (None, *ENGINES) and given["out"]
    if name in compose.COMMANDS:
        points = compose.points(name, overrides) if given.get("multirun") else [overrides]
        for point in points:
            compose.compose(name, point, given.get("config_dir") or [])


def has_options(words: list[str]) -> None:
    """Whether the command, its options and its keys exist; what stands for something else is passed over."""
    name, *rest = words
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    keys = known_keys() | {
        f"method.{field}": hint for method in METHODS for field, hint in method_fields(method).items()
    }
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"sparseft {name} has no option {word}"
        elif re.match(r"[a-z][\w.]*=", word):
            key = parse(word).key
            assert key in GROUPS or annotation_of(key, keys), f"no setting {key}"


# ---- what runs: on the bundled model, in a folder that a page's commands share, a few steps and questions long ----

FEW = ["trainer.max_length=64", "dataset.max_examples=24"]
SHORT = {  # by the command: what is added to it
    "train": ["trainer.max_steps=2", "trainer.gradient_accumulation=1", *FEW],
    "preprocess": ["method.num_samples=2", *FEW],
    "eval": ["eval.limit=2", "eval.max_new_tokens=4", "eval.batch_size=2"],
}
RUNNING = [
    command
    for command in DOCUMENTED
    if not command.mark
    and command.words[0] == "sparseft"
    and (command.words[1] != "push" or "--dry-run" in command.words)  # no test publishes
]


def shortened(words: list[str]) -> list[str]:
    """The command on the bundled model, with a few steps and questions."""
    name = words[0]
    words = ["model.path=bundled:tiny" if word.startswith("model.path=") else word for word in words]
    if "-m" in words:  # a sweep of one point
        words = [re.sub(r"^([\w.]+=[^\[,]+),.*$", r"\1", word) for word in words]
    added = SHORT.get(name, [])
    keys = {word.partition("=")[0] for word in added}
    kept = [word for word in words if word.partition("=")[0] not in keys]
    if name == "eval" and "--limit" in kept:
        added = [word for word in added if not word.startswith("eval.limit")]
        kept[kept.index("--limit") + 1] = "2"
    if name == "eval" and "--batch-size" in kept:
        added = [word for word in added if not word.startswith("eval.batch_size")]
    return kept + added


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `outputs/latest`."""
    folder = tmp_path_factory.mktemp("documented")
    run(folder, *shortened(["train", "method=s2ft"]))
    return folder


@pytest.mark.parametrize("page", sorted({command.page for command in RUNNING}), ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader types them."""
    shutil.copytree(tiny_run, tmp_path / "here", symlinks=True)
    for command in RUNNING:
        if command.page == page:
            monkeypatch.setattr("sys.stdin", io.StringIO(command.stdin))
            done = run(tmp_path / "here", *shortened(command.words[1:]), code=None)
            assert done.code == 0, f"{command.place}: {command.text}\n{done.err}"


# ---- Python ----


@pytest.mark.parametrize("block", named(python_blocks()))
def test_python_compiles_and_names_what_there_is(block: Block) -> None:
    tree = ast.parse(block.body, block.place)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sparseft":
            assert node.attr in sparseft.__all__, f"{block.place}: no sparseft.{node.attr}"


WHOLE = ("README.md", "api.md", "how-it-works.md", "serving.md")  # pages whose Python runs
RUNS = [block for block in python_blocks() if block.page.name in WHOLE and not block.mark]


@pytest.mark.parametrize("block", named(RUNS))
def test_python_runs(block: Block, in_tmp: Path) -> None:
    """With a tiny model, batches for it, two adapters and a prompt for each row."""
    ids = torch.randint(3, 60, (3, 8))
    for name in ("math", "chat"):
        other = sparseft.attach(build_model("llama"), sparseft.S2FTConfig(sparsity=0.9))
        sparseft.save_adapter(other, f"adapters/{name}")
    names: dict[str, Any] = {
        "sparseft": sparseft,
        "model": build_model("llama").eval(),
        "batches": [{"input_ids": ids, "labels": ids}],
        "ids": ids,
        "input_ids": ids,
    }
    exec(compile(block.body, block.place, "exec"), names)


# ---- pages ----


def test_every_public_name_stands_on_the_page_of_the_api() -> None:
    text = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^::: sparseft\.([\w.]+)\.(\w+)$", text, flags=re.MULTILINE)
    assert {name for _, name in listed} == set(sparseft.__all__) - {"__version__"}
    for module, name in listed:
        found = getattr(__import__(f"sparseft.{module}", fromlist=[name]), name)
        assert found is getattr(sparseft, name) and found.__module__ == f"sparseft.{module}"


@pytest.mark.parametrize("script", ["config_reference", "draw_docs"])
def test_what_a_script_writes_is_what_is_there(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    assert __import__(script).main(["--check"]) == 0, f"run python scripts/{script}.py"


def test_lists_begin_after_an_empty_line() -> None:
    """GitHub does without; the site's Markdown does not."""
    for page in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = re.sub(r"^```.*?^```", "\n", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found = re.search(r"^(?![-\s|#<]|\d+\.).+\n(?:- |\d+\. ).*", text, flags=re.MULTILINE)
        assert not found, f"{page.relative_to(ROOT)}: {found[0]}"


def test_blocks_close() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), page


def test_what_a_command_printed_wraps_on_the_site() -> None:
    """The class that site.css names is the one that the site's Markdown gives."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'sparseft[docs]'")
    import markdown
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"))
    html = markdown.markdown(
        "```text\nx\n```\n", extensions=config["markdown_extensions"], extension_configs=config["mdx_configs"]
    )
    assert ".language-text code" in (ROOT / "docs/site.css").read_text() and 'class="language-text' in html


def test_code_on_the_page_of_settings_is_not_broken_by_code_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    cell = __import__("config_reference").cell
    assert cell("`sparseft train model.path=FOLDER {x}`: of model.path") == (
        "`sparseft train model.path=FOLDER {x}`: of `model.path`"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_choices_that_the_page_of_settings_gives_it(name: str) -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    section = page.partition(f"### `method={name}`\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `method\.(\w+)` .* \| (`\w+`(?:, `\w+`)*) \|$", section, re.MULTILINE)
    assert rows or name in ("lora", "dora")
    for field, choices in rows:
        for choice in re.findall(r"\w+", choices):
            get_method(name)(**{field: yaml.safe_load(choice)}).validate()


def test_the_settings_that_a_run_goes_on_with_are_those_of_the_code() -> None:
    page = (ROOT / "docs/how-it-works.md").read_text()
    found = re.search(
        r"^A run goes on with other values of (.*?) and of\s`trainer\.`\{(.*?)\}", page, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    others, of_trainer = (re.findall(r"`([\w.*]+)`", part) for part in found.groups())
    assert FREE == {*(name.removesuffix(".*") for name in others), *(f"trainer.{name}" for name in of_trainer)}


def test_the_messages_on_the_page_of_errors_are_those_of_the_code() -> None:
    """Their fixed parts: between what is seen in a case, numbers and names, stand in a string of the source."""
    literals = []
    for path in (ROOT / "sparseft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                literals.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    source = "\n".join(literals)
    rows = re.findall(r"^\| (.*?) \| .* \|$", (ROOT / "docs/errors.md").read_text(), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]*)`", row)]
    assert len(messages) > 30
    missing = []
    for message in messages:
        for part in re.split(r"…|'[^']*'|\S*[=_]\S*|\S*\d\S*|[():;,.](?= |$)|[()]", message):
            words = part.split()
            holed = (" ".join([*words[:place], "…", *words[place + 1 :]]) for place in range(len(words)))
            found = part.strip() in source or any(each in source for each in holed)
            missing += [] if found else [f"'{part.strip()}' ({message})"]
    assert not missing, "\n".join(missing)
