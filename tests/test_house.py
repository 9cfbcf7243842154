"""The rules of the house, held by reading the source: what shared code may know, circles, what stays light, papers.

Which way imports point, and which part sees which library, are contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sparseft.config import HardwareConfig, ModelConfig
from sparseft.methods import METHODS, get_method
from sparseft.methods.base import SparseConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparseft"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Loaded by `sparseft --help`, `import sparseft` or composing a config: nothing heavy when they are imported.
LIGHT = re.compile(
    r"(__init__|__main__|config|rules|errors|console|replaced|(cli|compose|files|runs|report|distributed|commands)"
    r"|cli\.(app|jobs|outcome)|compose\.\w+|files\.(atomic|untrusted)|runs\.\w+|report\.\w+|distributed\.(env|launch)"
    r"|commands\.report|methods(\.(?!exact_targets\b)\w+)?|selection|data\.prompts|evaluation\.tasks)"
)
HEAVY = (
    "torch transformers peft accelerate datasets lm_eval deepspeed triton hydra omegaconf numpy pandas pyarrow "
    "safetensors tokenizers huggingface_hub jinja2 matplotlib"
).split()

# Settings that not every method has; shared code asks `methods.base` instead.
OWN_FIELDS = {field.name for name in METHODS for field in dataclasses.fields(get_method(name))} - set(dir(SparseConfig))
OWN_FIELDS -= {field.name for part in (ModelConfig, HardwareConfig) for field in dataclasses.fields(part)}  # dtype
HOLDS_SETTINGS = {"config", "method", "settings", "method_config"}  # names under which code has a method's settings
# Theirs are of their own, under such names.
OTHER_SETTINGS = {"adapters.peft.fusing", "adapters.peft.kind", "importance.kfac"}

# Only these may know a method by name: the methods themselves, the comparisons and what shows users an example.
KNOWS_METHODS = {"methods", "bench", "cli", "commands", "__init__"}
ALSO_KNOWS = {("config", "s2ft"), ("config", "sylva"), ("config", "lora"), ("importance", "sylva"), ("export", "lora")}
# config: the benchmark's default list; importance: the score that is called so; export: what GGUF calls an adapter.
SHARED_METHODS = ("methods.base", "methods.exact_targets")  # what every method or kind of it uses


def dotted(path: Path) -> str:
    """`sparseft/data/prompts.py` -> `data.prompts`; a package is named by its folder, the top one `__init__`."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """By all tests here; those that follow in the process have no use for hundreds of trees."""
    yield
    nodes.cache_clear()
    imported.cache_clear()


@functools.cache
def imported(path: Path) -> list[tuple[str, int]]:
    """Every sparseft module that this one imports anywhere, dotted below the package, and the line."""
    package, imports = ["sparseft", *dotted(path).split(".")], []
    for node in nodes(path):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, below = name.partition(".")
            if first != "sparseft" or not below or below == "__version__":  # a fact, not a facility
                continue
            parts = below.split(".")
            known = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            found = [name for name in known if (PACKAGE / (name.replace(".", "/") + ".py")).exists()
                     or (PACKAGE / name.replace(".", "/")).is_dir()]  # fmt: skip
            imports.append((found[0] if found else parts[0] if len(parts) > 1 else "__init__", node.lineno))
    return imports


def docstrings(code: Iterable[ast.AST]) -> set[int]:
    """Ids of the constants that are docstrings."""
    found = set()
    for node in code:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def test_nobody_inside_comes_in_by_the_front_door() -> None:
    """What `sparseft/__init__.py` offers lies elsewhere. The contracts leave it out: all may ask it for the version."""
    for path in MODULES:
        module = dotted(path)
        if module not in ("__init__", "__main__"):
            for target, line in imported(path):
                assert target != "__init__", f"{module}:{line} imports from sparseft/__init__.py"


def test_a_family_of_files_has_a_folder() -> None:
    """Not a prefix: of three siblings and more."""
    for folder in {path.parent for path in MODULES}:
        prefixes = Counter(path.stem.split("_")[0] for path in folder.glob("[!_]*.py"))
        family, size = prefixes.most_common(1)[0] if prefixes else ("", 0)
        assert size < 3, f"{folder.relative_to(ROOT)} has {size} files called {family}…"


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or through others, by what each imports; a module's own name aside."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in imports.get(left.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    left.append(target)
        return seen

    below = {module: reached(module) for module in imports}
    found = {frozenset(other for other in below[m] if m in below.get(other, ())) for m in imports if m in below[m]}
    return sorted((set(circle) for circle in found if len(circle) > 1), key=sorted)


def test_no_modules_import_each_other() -> None:
    """Also in a function or for the type checker only."""
    imports = {dotted(path): {target for target, _ in imported(path)} for path in MODULES}
    assert not circles(imports)


def test_the_circle_test_sees_what_it_should() -> None:
    straight = {"a": {"b", "c"}, "b": {"c"}, "c": {"c"}}
    assert not circles(straight)
    assert circles(straight | {"c": {"d"}, "d": {"b"}, "e": {"f"}, "f": {"e", "a"}}) == [{"b", "c", "d"}, {"e", "f"}]


def test_shared_code_names_no_method() -> None:
    faults, methods = [], set(METHODS) - {"full"}
    for path in MODULES:
        module = dotted(path)
        part = module.split(".")[0]
        if part in KNOWS_METHODS:
            continue
        skip = docstrings(nodes(path))
        for node in nodes(path):
            if isinstance(node, ast.Constant) and id(node) not in skip and node.value in methods:
                if (part, node.value) not in ALSO_KNOWS:
                    faults.append(f"{module}:{node.lineno} knows the method '{node.value}'")
        for target, line in imported(path):
            if target.startswith("methods.") and target not in SHARED_METHODS:
                faults.append(f"{module}:{line} imports {target}")
    assert not faults, "\n".join(faults)


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_module_imports_another() -> None:
    """What several share stands in tests/support."""
    faults = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for parts in (name.split(".") for name in names):
                if parts[0] == "conftest" or any(part.startswith("test_") for part in parts[:2]):
                    faults.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {'.'.join(parts)}")
    assert not faults, "\n".join(faults)


def own_fields_read(code: Iterable[ast.AST]) -> list[str]:
    """Where code reads a setting that only some methods have, as `line: field`."""

    def holds(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", None)) in HOLDS_SETTINGS

    found = []
    for node in code:
        field = None
        if isinstance(node, ast.Attribute) and holds(node.value):
            field = node.attr
        elif isinstance(node, ast.Subscript) and holds(node.value) and isinstance(node.slice, ast.Constant):
            field = node.slice.value
        elif isinstance(node, ast.Call) and node.args:
            asks = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr")
            got = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and holds(node.func.value)
            name = node.args[1] if asks else node.args[0]
            if (got or (asks and holds(node.args[0]))) and isinstance(name, ast.Constant):
                field = name.value
        if field in OWN_FIELDS:
            found.append(f"{node.lineno}: {field}")
    return found


def test_shared_code_reads_no_methods_own_setting() -> None:
    faults = []
    for path in MODULES:
        module = dotted(path)
        if module.split(".")[0] not in KNOWS_METHODS and module not in OTHER_SETTINGS:
            faults += [f"{module}:{found}" for found in own_fields_read(nodes(path))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('hasattr(config, "num_partition")', ["1: num_partition"]),
        ('getattr(run.method, "alpha", 0.0)', ["1: alpha"]),
        ('state.method_config.get("layout")', ["1: layout"]),
        ("run.method.damping", ["1: damping"]),
        ('settings["roles"]', ["1: roles"]),
        ("config.block_size + method.scope + pattern.rank", []),
    ],
)
def test_that_test_sees_what_it_should(source: str, found: list[str]) -> None:
    assert own_fields_read(ast.walk(ast.parse(source))) == found


def test_importing_light_modules_loads_nothing_heavy() -> None:
    """By what Python really loads: a light module may reach a heavy one through others."""
    light = [dotted(path) for path in MODULES if LIGHT.fullmatch(dotted(path)) and dotted(path) != "__main__"]
    names = ["sparseft" if name == "__init__" else f"sparseft.{name}" for name in light]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not loaded, f'importing {name} loads {loaded}'\n"
        "from sparseft.methods import METHODS, get_method\n"
        "for name in METHODS:\n"
        "    get_method(name)().validate()\n"
        "assert 'torch' not in sys.modules, 'checking settings loads torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_nothing_private_is_taken_from_another_module() -> None:
    """A name with an underscore is its module's own: neither imported from another one nor read off it."""
    faults, names = [], {dotted(module) for module in MODULES}
    for path in MODULES:
        taken: dict[str, str] = {}  # modules of the package, by the names that they have here
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparseft":
                for alias in node.names:
                    taken[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        faults.append(f"{dotted(path)}:{node.lineno}: {node.module}.{alias.name}")
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken:
                module = taken[node.value.id].removeprefix("sparseft.")
                if module in names and node.attr.startswith("_") and not node.attr.startswith("__"):
                    faults.append(f"{dotted(path)}:{node.lineno}: {module}.{node.attr}")
    assert not faults, "\n".join(faults)


# -- one place for each act -------------------------------------------------------------------------------------------

# A file's name of a run folder, as a text of its own: `runs/folder.py` has a constant for it.
RUN_FILES = set(
    "config.yaml environment.json metrics.jsonl summary.json report.html bench.json train_questions.safetensors "
    "samples.jsonl trackers.json checkpoints checkpoint- .best best.json .partial- eval/before".split()
)
RUN_FOLDERS = {"adapter", "selection", "eval"}  # words of many meanings: where they are joined to a path
RANK_WORDS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SPARSEFT_QUIET"}
RANK_NAMES = {"get_rank", "get_world_size", "is_world_process_zero", "is_local_process_zero", "is_main_process"}


def acts(code: Sequence[ast.AST]) -> Iterator[tuple[str, int]]:
    """(act, line) of what only one place may do."""
    skip = docstrings(code)
    for node in code:
        if isinstance(node, ast.Attribute):
            name = node.attr
            if name in ("rename", "renames", "mkdtemp", "mkstemp", "umask", "fsync") or (
                name in ("replace", "symlink") and isinstance(node.value, ast.Name) and node.value.id == "os"
            ):
                yield "rename", node.lineno
            if name in RANK_NAMES:
                yield "rank", node.lineno
            if name in ("load", "loads") and isinstance(node.value, ast.Name) and node.value.id == "json":
                yield "json", node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "replace" and len(node.args) == 1 and not node.keywords:  # not a text's: it takes two
                yield "rename", node.lineno
        if isinstance(node, ast.Constant) and id(node) not in skip:
            if node.value in RANK_WORDS:
                yield "rank", node.lineno
            if node.value in RUN_FILES:
                yield "name", node.lineno
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            if node.right.value in RUN_FOLDERS:
                yield "name", node.lineno


ACTS = {
    "rename": ("files.atomic",),
    "rank": ("distributed", "console"),  # console: the variable by which others are silenced
    "json": ("files.untrusted", "files.hashing", "data"),  # hashing: what was just written; data: users' records
    "name": ("runs.folder", "files.atomic"),
}


def test_each_act_has_one_place() -> None:
    """Writing aside and renaming; asking for the first process; reading a JSON file; the names in a run folder."""
    faults = []
    for path in MODULES:
        module = dotted(path)
        for act, line in acts(nodes(path)):
            if not any(module == place or module.startswith(f"{place}.") for place in ACTS[act]):
                faults.append(f"{module}:{line}: {act} belongs to {', '.join(ACTS[act])}")
    assert not faults, "\n".join(faults)


# Libraries whose insides or whose grammar one part of the package knows for the others.
LIBRARIES = {
    "deepspeed": ("distributed",),
    "accelerate": ("distributed", "data.sampling"),  # sampling: the order in which its data loader draws
    "hydra": ("compose",),
    "omegaconf": ("compose",),
    "lm_eval": ("evaluation",),
    "psutil": ("memory",),
}


def test_each_library_has_one_place() -> None:
    faults = []
    for path in MODULES:
        module = dotted(path)
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} & LIBRARIES.keys():
                if not any(module == place or module.startswith(f"{place}.") for place in LIBRARIES[name]):
                    faults.append(f"{module}:{node.lineno}: {name} belongs to {', '.join(LIBRARIES[name])}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "act"),
    [
        ("os.replace(a, b)", "rename"),
        ("path.rename(b)", "rename"),
        ("path.replace(b)", "rename"),
        ("text.replace('a', 'b')", None),
        ("dataclasses.replace(a, b=1)", None),
        ("os.environ['RANK']", "rank"),
        ("dist.get_rank()", "rank"),
        ("json.loads(path.read_text())", "json"),
        ("json.dumps(x)", None),
        ("run / 'adapter'", "name"),
        ("run / 'summary.json'", "name"),
        ("kind = 'adapter'", None),
        ("raise UserError('the run has no summary.json')", None),
    ],
)
def test_the_test_of_acts_sees_what_it_should(source: str, act: str | None) -> None:
    assert {found for found, _ in acts([*ast.walk(ast.parse(source))])} == ({act} if act else set())


# -- the package's papers ---------------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints(file: str = "constraints.txt") -> dict[str, str]:
    """Name (as pip normalises it) -> pinned version."""
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            pins[normal(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return pins


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_version_everywhere() -> None:
    version = project()["version"]
    done = subprocess.run(
        [sys.executable, "-c", "import sparseft; print(sparseft.__version__)"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == version, done.stderr
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_tested_versions_lie_within_the_declared_ranges() -> None:
    pins = constraints()
    extras = [text for texts in project()["optional-dependencies"].values() for text in texts]
    declared = [Requirement(text) for text in project()["dependencies"] + extras]
    left_open = {"triton", "build", "hatchling", "sparseft", "mlflow"}  # mlflow: mlflow-skinny in its place
    for requirement in declared:
        name = normal(requirement.name)
        if name not in left_open:
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {name} {pins[name]}"


def test_the_lowest_versions_are_those_declared() -> None:
    pins = constraints("constraints-lowest.txt")
    for requirement in map(Requirement, project()["dependencies"]):
        lowest = next(each.version for each in requirement.specifier if each.operator == ">=")
        assert Version(pins[normal(requirement.name)]) == Version(lowest), f"{requirement} is not tested from {lowest}"


def test_ruff_is_pinned_once() -> None:
    pinned = set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert pinned == {constraints()["ruff"]}


def test_every_import_is_declared() -> None:
    """A third-party package that the source imports is a dependency, not one that happens to come with another."""
    provided = {"lm_eval": "lm-eval", "hydra": "hydra-core", "yaml": "pyyaml"}
    optional = {
        "liger_kernel",
        "bitsandbytes",
        "torchao",
        "gguf",
        "llama_cpp",
        "mlx",
        "mlx_lm",
        "trl",
        "wandb",
        "mlflow",
        "trackio",
    }
    declared = {normal(Requirement(text).name) for text in project()["dependencies"]}
    comes_with = {"tokenizers": "transformers", "click": "typer"}
    comes_with |= {"pyarrow": "datasets"}
    for path in MODULES:
        for node in nodes(path):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - optional:
                if name != "sparseft":
                    package = comes_with.get(name, provided.get(name, name))
                    assert normal(package) in declared, f"{dotted(path)}:{node.lineno} imports {name}: not declared"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in re.findall(r"^\.PHONY: ([\w-]+)$", text, flags=re.MULTILINE):
        assert re.search(rf"^  {target} +\S", done.stdout, flags=re.MULTILINE), f"make help leaves out {target}"
