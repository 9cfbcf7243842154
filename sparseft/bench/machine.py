"""The processor that a benchmark ran on, by which its times can be judged and repeated."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.runs.environment import usable_cores

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """`cpu` (its model's name), `cores` (that this process may use) and `threads` (of torch's operations)."""
    import torch

    return {"cpu": cpu_name(), "cores": usable_cores(), "threads": torch.get_num_threads()}


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
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measured_on(result: Mapping[str, Any]) -> str:
    """Where a result was measured, for the head of its table: the CPU, or the GPU and the CPU that drives it."""
    environment = result["environment"]
    cores, threads = environment["cores"], environment["threads"]
    size = f"{cores} {'core' if cores == 1 else 'cores'}, {threads} {'thread' if threads == 1 else 'threads'}"
    if result.get("device", "cpu") == "cpu":
        return f"{environment['cpu']} ({size})"
    return f"{result['device']} (host: {environment['cpu']}, {size})"
