"""What a command loads before it works: counted, not timed, so that a busy machine changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.version import Version

from support.places import ROOT

# Runs a command and prints, as the last line, the modules there are at its end, and which of WATCHED the package asked
# for itself, apart from what transformers loads. What is asked for once a run's summary.json is there, and so all work
# done, counts apart, as `late`, and the modules are those of that moment.
PROGRAM = """
import builtins, json, sys
import pathlib
WATCHED = {"peft", "lm_eval", "datasets", "deepspeed", "accelerate", "hydra", "rich", "jinja2", "matplotlib"}
asked, late, before = set(), set(), set()
plain = builtins.__import__

def watching(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name.split(".")[0] in WATCHED and (globals or {}).get("__name__", "").startswith("sparseft"):
        done = list(pathlib.Path.cwd().glob("outputs/*/summary.json"))
        (late if done else asked).add(name.split(".")[0])
        if done and not before:
            before.update(sys.modules)
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = watching
from sparseft.cli.app import main
code = main(sys.argv[1:])
modules = sorted(before or sys.modules)
print(json.dumps({"code": code, "modules": modules, "asked": sorted(asked), "late": sorted(late)}))
"""


def loads(cwd: Path, *words: str, late: Sequence[str] = ()) -> tuple[set[str], set[str]]:
    """Modules that `sparseft WORDS` has loaded when its work is done, and the watched packages that sparseft imported.

    late: the packages that it imports after that.
    """
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment())
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 0 and seen["late"] == list(late), done.stderr
    return set(seen["modules"]), set(seen["asked"])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_importing_the_package_loads_next_to_nothing() -> None:
    """0.1 s are allowed; a module takes about half a millisecond."""
    code = "import sys; before = set(sys.modules); import sparseft; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) <= 40


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["bench", "-h"], ["chat", "-h"], ["--version"]], ids=" ".join
)
def test_help_loads_little(words: list[str], tmp_path: Path) -> None:
    """0.3 s are allowed for it."""
    modules, asked = loads(tmp_path, *words)
    assert not asked
    heavy = {"torch", "transformers", "numpy", "yaml", "hydra", "omegaconf", "rich", "asyncio", "http", "ssl", "jinja2",
             "matplotlib"}  # fmt: skip
    assert not heavy & modules
    assert len(modules) < 400


def test_a_configuration_is_composed_without_torch(tmp_path: Path) -> None:
    modules, asked = loads(tmp_path, "train", "method=s2ft", "--cfg")
    assert asked == {"hydra"} and not {"torch", "transformers", "numpy", "rich"} & modules


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """What a step of training on the bundled model with its selection cached loads."""
    folder = tmp_path_factory.mktemp("startup")
    words = ["method=s2ft", "trainer.max_steps=1", "trainer.gradient_accumulation=1", "hardware=cpu"]
    words.append("dataset.max_examples=40")
    command = [sys.executable, "-m", "sparseft", "preprocess", *words]
    subprocess.run(command, capture_output=True, cwd=folder, env=environment(), check=True)
    loaded = loads(folder, "train", *words, late=["jinja2", "matplotlib"])  # for the page at the end
    assert len(list((folder / ".cache" / "sparseft" / "selections").iterdir())) == 1  # the cached one was taken
    return loaded


def test_training_asks_only_for_what_it_needs(training: tuple[set[str], set[str]]) -> None:
    """Local files need no datasets, a sparse method no peft, one process no deepspeed, training no lm-eval; accelerate
    is a part of transformers' Trainer."""
    _, asked = training
    assert asked == {"hydra", "accelerate"}


def test_training_loads_no_compiler_no_evaluation_and_nothing_that_is_only_installed(
    training: tuple[set[str], set[str]],
) -> None:
    modules, _ = training
    assert "torch" in modules and "transformers.trainer" in modules
    tools = {"lm_eval", "evaluate", "sklearn", "nltk", "matplotlib", "torchvision"}
    tools |= {"deepspeed", "mlflow", "fastapi", "opentelemetry", "tensorboard", "wandb", "trackio"}
    tools |= {"peft", "datasets", "pandas", "pyarrow", "scipy"}
    if Version(importlib.metadata.version("transformers")) < Version("5.23"):
        tools -= {"sklearn", "scipy", "pandas", "pyarrow"}  # it imports scikit-learn, which takes the others
    assert tools & modules == set()
    assert "sparseft.evaluation.harness" not in modules and "sparseft.bench" not in modules
    assert not [name for name in modules if name.startswith("torch._inductor.codegen")]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no triton"])
def test_nothing_is_collected_while_a_command_is_imported(triton: bool) -> None:
    """Each look for garbage goes through all that torch and transformers have made, and what they have made stays; at
    the end it is gone through only for Triton, whose bindings would complain: else it takes a second for nothing."""
    code = """
import atexit, gc, sys
TRITON = len(sys.argv) > 1
if not TRITON:
    sys.modules["triton"] = None  # as where it is not installed
atexit.register(lambda: print(gc.get_freeze_count() > 100_000, "triton._C.libtriton" in sys.modules))
gc.callbacks.append(lambda phase, info: looks.append(info["generation"]))
looks = []
from sparseft.cli.jobs import command_module
looks.clear()
command_module("train")
print(looks, gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1_000)
before = gc.get_freeze_count()
command_module("preprocess")  # torch is there: whatever else has been made by now stays ordinary
print(gc.get_freeze_count() <= before)
"""
    words = [sys.executable, "-c", code, *(["triton"] if triton else [])]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    imported, again, end = done.stdout.splitlines()
    assert (imported, again) == ("[] True True True", "True")
    frozen, there = (word == "True" for word in end.split())
    assert triton or not there
    assert frozen is not there and "leak" not in done.stderr
