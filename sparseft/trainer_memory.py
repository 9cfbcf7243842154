"""How much memory a run takes: what torch allocated on CUDA, the process's resident set on the CPU."""

from __future__ import annotations

import contextlib
import os

import torch


def memory_bytes(device: torch.device, *, peak: bool) -> int:
    """Bytes in use now, or at their peak since `reset_peak_memory` (on the CPU of the whole process, Python too)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if os.uname().sysname == "Darwin" else usage * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Lets the peak start again from what is in use, so that a run does not report an earlier run's.

    Where the system has no such thing for a process (not Linux), the CPU's peak stays the process's since it started.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
