"""What a run ran on: versions, commit, command line."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "datasets", "lm_eval", "deepspeed", "triton", "safetensors",
    "tokenizers", "huggingface_hub", "bitsandbytes", "torchao", "gguf",
)  # fmt: skip


def environment(device: str, dtype: str, world_size: int) -> dict[str, Any]:
    """What the run ran on, for `environment.json`: versions (None: not installed), commit, machine, command line.

    Read from the packages' metadata, so nothing is imported. Neither the user nor the host is named.
    """
    return {
        "versions": {"sparseft": version_of("sparseft"), "python": platform.python_version()}
        | {package: version_of(package) for package in PACKAGES},
        "commit": package_commit(),
        "device": str(device),
        "dtype": str(dtype),
        "world_size": int(world_size),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command_line": _command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _command_line() -> str:
    """The command as it would be typed again: the program's name without the folders it happens to lie in."""
    arguments = list(sys.orig_argv) or list(sys.argv)
    if arguments[0] != sys.argv[0] and len(arguments) > 1 and Path(arguments[1]).name == Path(sys.argv[0]).name:
        arguments = arguments[1:]  # python /…/bin/sparseft train -> sparseft train
    return shlex.join([Path(arguments[0]).name, *arguments[1:]])


def package_commit() -> str | None:
    """The git commit of the checkout that the package lies in, `-dirty` after it when tracked files are changed.

    None for an installed package, also where its environment lies inside some other repository.
    """
    package = Path(__file__).resolve().parent
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                env=clean | {"GIT_OPTIONAL_LOCKS": "0"},
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system too slow to wait for
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # not a tracked file: not our repository
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit
