"""Where a benchmark leaves its result, and the machine it ran on, by which its times can be judged and repeated."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparseft.compose.run_config import to_yaml
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.files.atomic import try_writing, write_json, write_text
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import resolve_device
from sparseft.runs import folder as folders
from sparseft.runs.environment import environment

CPUINFO = Path("/proc/cpuinfo")
# What lies in place of a complete result until there is another (`Output.place`).
ASIDE = ("bench.partial.json", "bench.partial.yaml", "scaling-*.partial.svg")


class Output:
    """The folder that a benchmark leaves its files in, made when there is something to put there."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir).expanduser() if config.output_dir else None
        self.left: Path | None = None  # `bench.json`, or what lies in its place, once there is one
        self._environment: dict[str, Any] = {}
        self._keeps = self._again = False

    def check(self) -> None:
        """Refuses a folder that cannot be made or written, before anything is measured; leaves nothing behind."""
        folder = folders.OUTPUTS if self.folder is None else self.folder
        what = "the folder" if self.folder is None else "output_dir"
        made: list[Path] = []
        try:  # some file systems refuse what their modes allow
            folders.check_writable(folder, what)
            for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
                each.mkdir()
                made.append(each)
            try_writing(folder)
        except OSError as error:
            raise UserError(f"cannot write to {what} '{folder}': {error.strerror or error}.") from error
        finally:
            for each in reversed(made):
                with contextlib.suppress(OSError):  # somebody else's file is in it by now
                    each.rmdir()
        if self.folder is not None:  # may hold what an earlier benchmark has left
            self._keeps = _complete(self.folder / folders.BENCH)
            a_runs = ("bench.yaml", folders.SUMMARY, folders.METRICS, folders.ADAPTER)
            a_run = any((self.folder / name).exists() for name in a_runs)
            self._again = (self.folder / folders.BENCH).is_file() and not a_run

    def choose(self) -> Path:
        """The folder, with a name of its own where none was given; makes nothing."""
        if self.folder is None:
            self.folder = Path(folders.OUTPUTS, f"bench-{folders.timestamp()}")
        return self.folder

    def place(self, name: str, complete: bool = True) -> Path:
        """Where a file of that name belongs; the folder is there.

        complete: false for one of an incomplete result, which takes no complete one's place.
        """
        if self._keeps and not complete:
            name = f"{Path(name).stem}.partial{Path(name).suffix}"
        if self.folder is None:
            self.folder = folders.new_folder(f"bench-{folders.timestamp()}")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, name: str, text: str) -> None:
        """Writes a file of that name."""
        write_text(self.place(name), text)

    def leave(self, result: dict[str, Any], complete: bool) -> None:
        """Writes `bench.json`, into the result too what it ran on and where it lies, and the settings beside it.

        complete: false for what there is so far, which a later call replaces. A complete `bench.json` from before stays
        until then, and this is `bench.partial.json`.
        """
        path = self.place(folders.BENCH, complete)
        if not self._environment:
            device = str(resolve_device(self.config.hardware.device))
            self._environment = environment(device, result["dtype"], 1) | machine()
        result |= {"complete": complete, "environment": self._environment, "path": str(path)}
        write_json(path, result)
        if self.left != path:
            beside_a_run = folders.is_run(path.parent) and not self._again  # whose own `config.yaml` stays
            name = "bench.yaml" if beside_a_run else folders.CONFIG
            self.write(name if path.name == folders.BENCH else "bench.partial.yaml", to_yaml(self.config))
        self.left = path
        for pattern in ASIDE if complete else ():
            for leftover in path.parent.glob(pattern):
                leftover.unlink()


def _complete(path: Path) -> bool:
    """Whether there is a `bench.json` that does not say it is incomplete; one that cannot be read is kept as well."""
    if not path.is_file():
        return False
    try:
        return read_json_object(path).get("complete") is not False
    except UserError:
        return True


def as_markdown(result: Mapping[str, Any], facts: str, columns: list[str], rows: list[list[str]]) -> str:
    """A result's table as Markdown, with the command and the versions that made it, after `facts`."""
    environment = result["environment"]
    versions = ", ".join(
        f"{name} {environment['versions'][name]}" for name in ("sparseft", "torch", "transformers", "peft")
    )
    lines = [f"`{environment['command_line']}`", "", f"{facts}; {versions}, {measured_on(result)}.", ""]
    return "\n".join(lines) + "\n" + markdown_table(columns, rows)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """`cpu` (its model's name), `cores` (that this process may use) and `threads` (of torch's operations)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_name(), "cores": cores, "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """The model's name as the system gives it, else the architecture's (`aarch64`)."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                return " ".join(value.split())
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def device_name(device: torch.device) -> str:
    """What a result says it was measured on: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measured_on(result: Mapping[str, Any]) -> str:
    """Where a result was measured, for the head of its table: the CPU, or the GPU and the CPU that drives it."""
    environment = result["environment"]
    cores, threads = environment["cores"], environment["threads"]
    size = f"{cores} {'core' if cores == 1 else 'cores'}, {threads} {'thread' if threads == 1 else 'threads'}"
    if result.get("device", "cpu") == "cpu":
        return f"{environment['cpu']} ({size})"
    return f"{result['device']} (host: {environment['cpu']}, {size})"
