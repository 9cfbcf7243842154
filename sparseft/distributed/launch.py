"""One process or many: starts a command's processes on this machine and stands for them.

The parent composes and checks the configuration, starts one process a device through the engine of torchrun
(`torch.distributed.elastic.multiprocessing`), passes signals on, and turns what becomes of the children into what the
command would have done alone: its result, or one exception. The children run `sparseft.cli.worker`. Only rank 0 writes
to the terminal; the others' output is kept aside and shown where it explains a failure. No torch at import.

A process that a launcher has started already (torchrun, DeepSpeed's runner, `srun` with a task a process) starts none.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sparseft import console, signals
from sparseft.config import HardwareConfig, RunConfig
from sparseft.distributed import env
from sparseft.errors import Interrupted, RunError, UserError
from sparseft.files.atomic import write_json
from sparseft.files.untrusted import read_json

WORKER = "sparseft.cli.worker"
JOB, RESULT, END = "job.json", "result.json", "end-{rank}.json"
POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # that interrupted processes have to save, once the first of them has ended
SEEN_LATE = 2.0  # seconds by which torch may record a process's end late: it knows whole seconds only
LOG_LINES = 5  # lines of the log that are shown of a process that left no outcome
# A collective may wait for rank 0 to score a task; a process that died is noticed by the launcher, not by this.
TIMEOUT_HOURS = 6


@dataclass
class End:
    """What a child says of its end: the exit code and message that it would have had alone, and what its exception
    carried."""

    code: int
    message: str = ""
    last_checkpoint: str | None = None
    traceback: str = ""
    time: float = 0.0  # of the end, seconds since the epoch


class ResultLost(RunError):
    """All processes did their work, but the folder that they tell of it in is gone, as where TMPDIR was cleaned."""


class ChildTraceback(Exception):
    """The traceback of the process that failed, for --debug."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def needed(hardware: HardwareConfig) -> bool:
    """Whether the command has to start processes of its own. ZeRO takes one even alone: DeepSpeed is set up there."""
    env.adopt_slurm(hardware)
    total = hardware.all_processes
    return not env.started() and (total > 1 or hardware.zero_stage > 0)


def check(hardware: HardwareConfig) -> None:
    """Refuses numbers of processes that a launcher, or SLURM, contradicts, and a place that is none."""
    env.check_variables()
    env.adopt_slurm(hardware)
    total = hardware.all_processes
    if env.started() and total > 1 and total != env.processes(hardware):
        raise UserError(
            f"hardware.num_processes={hardware.num_processes} on hardware.num_machines={hardware.num_machines} are "
            f"{total} processes, but the launcher has started {env.processes(hardware)}: give the same number."
        )
    if not env.started() and hardware.num_machines > 1:
        env.machine_place(hardware)


def run(command: str, config: RunConfig) -> dict[str, Any]:
    """Runs `sparseft.commands.<command>.run(config)` in as many processes as the hardware asks for.

    Returns rank 0's result. Raises what one process would have raised: UserError, RunError (with `last_checkpoint`), or
    KeyboardInterrupt once the children have saved and ended; ResultLost. No child outlives it.
    """
    with tempfile.TemporaryDirectory(prefix="sparseft-") as made:
        folder = Path(made)
        job = {"command": command, "config": config.to_dict(), "arguments": sys.orig_argv, "parent": os.getpid()}
        write_json(folder / JOB, job)
        first, envs, store = _environments(config.hardware)
        ranks = [first + local for local in envs]
        console.log(f"processes: {len(ranks)} here, {envs[0]['WORLD_SIZE']} in all")
        ends, interrupted = _run_children(folder, envs)
        del store  # the children's meeting point
        left = [_end(folder, rank, local, *ends[local]) for local, rank in enumerate(ranks)]
        if failed := [end for end in left if end.code]:
            _raise(failed, interrupted)
        try:
            return read_json(folder / RESULT)
        except OSError as error:
            raise ResultLost(f"the processes have finished, but their result, '{folder / RESULT}', is gone.") from error


# ---- starting ----


def _environments(hardware: HardwareConfig) -> tuple[int, dict[int, dict[str, str]], Any]:
    """(the first rank here, the variables of each process by its number here, the store where they meet).

    The parent of the first machine holds the store, as torchrun's agent does: on one machine the system picks the port.
    """
    from torch.distributed import TCPStore

    machine, address, at = env.machine_place(hardware)
    count = hardware.num_processes
    store = None
    if machine == 0:
        store = TCPStore(address, at, is_master=True, wait_for_workers=False)
        at = store.port
    shared = {
        "WORLD_SIZE": str(count * hardware.num_machines),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(at),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "sparseft",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(env.threads() or max(1, (os.cpu_count() or 1) // count)),
        "PYTHONUNBUFFERED": "1",
    }
    if hardware.device == "cpu":  # accelerate and DeepSpeed would take a GPU that they see
        shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    first = machine * count
    return (
        first,
        {local: shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(count)},
        store,
    )


# ---- watching ----


def _run_children(folder: Path, envs: dict[int, dict[str, str]]) -> tuple[dict[int, tuple[int, float]], str | None]:
    """Starts the children and waits for their end; returns their exit codes, with when a failure was seen (seconds
    since the epoch), and the name of a signal seen meanwhile.

    The first signal is passed on (the children finish the step and save), a second one too (they stop at once), a
    third one kills them; those that come with the first count with it (`signals.TOGETHER`).
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # _raise reports the failure itself
    seen: list[str] = []
    since = math.inf
    pids: list[int] = []

    def pass_on(number: int, _frame: Any = None) -> None:
        nonlocal since
        now = time.monotonic()
        since = min(since, now)
        if seen and now - since < signals.TOGETHER:
            return
        seen.append(signal.Signals(number).name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.killpg(pid, number if len(seen) < 3 else signal.SIGKILL)

    ending = signals.ending()  # before torch handles them
    quiet = {local: Std.ALL for local in envs if envs[local]["RANK"] != "0"}
    with _signals_restored():
        children = start_processes(
            name="sparseft",
            entrypoint=sys.executable,
            args={local: ("-m", WORKER, str(folder)) for local in envs},
            envs=envs,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=quiet),
        )
        try:
            pids.extend(children.pids().values())
            if threading.current_thread() is threading.main_thread():
                for number in ending:
                    signal.signal(number, pass_on)
                if signals.HANGUP is not None and signals.HANGUP not in ending:  # as under nohup; torch handles it
                    signal.signal(signals.HANGUP, signal.SIG_IGN)
            result = None
            first_end = math.inf
            while result is None:
                time.sleep(POLL_SECONDS)
                running = [handler.proc.poll() is None for handler in children.subprocess_handlers.values()]
                if not all(running):
                    first_end = min(first_end, time.monotonic())
                if seen and any(running) and time.monotonic() < first_end + GRACE_SECONDS:
                    continue  # each saves and ends by itself: torch would kill the others after the first
                result = children.wait(timeout=0)
        finally:
            children.close(signal.SIGKILL)  # whatever happened, no child is left running
    ends = dict.fromkeys(envs, (0, 0.0))
    ends |= {local: (failure.exitcode, float(failure.timestamp)) for local, failure in result.failures.items()}
    return ends, seen[0] if seen else None


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Afterwards signals are handled as before: torch sets handlers of its own when it starts processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*signals.ending(), signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what became of them ----


def _end(folder: Path, rank: int, local: int, code: int, seen: float) -> End:
    """What a child left of itself, else what its exit code, `seen` at that time, tells and the last that it wrote."""
    path = folder / END.format(rank=rank)
    if path.is_file():
        return End(**read_json(path))
    if code == 0:
        return End(0)
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
        # A kill is noticed only after the failures that it causes elsewhere. SIGTERM is the launcher's own.
        seen = math.inf if -code == signal.SIGTERM else seen - SEEN_LATE
    else:
        reason = f"ended with exit code {code} and said nothing"
    return End(code if code in (2, 130) else 1, f"process {rank} {reason}.{_log(folder, local)}", time=seen)


def _log(folder: Path, local: int) -> str:
    """The last lines of what a process wrote, if it was kept aside."""
    for path in folder.glob(f"**/{local}/stderr.log"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = " | ".join([line for line in lines if line][-LOG_LINES:])
        return f" Its last words: {last}" if last else ""
    return ""


def _raise(failed: list[End], interrupted: str | None) -> None:
    """Raises what the process that failed first would have raised alone.

    When one process ends, the others fail for want of it: wrong input comes before failures, these by time.
    """
    checkpoint = next((end.last_checkpoint for end in failed if end.last_checkpoint), None)
    first = min(failed, key=lambda end: (end.code != 2, end.time))
    error: BaseException = UserError(first.message) if first.code == 2 else RunError(first.message, checkpoint)
    if interrupted or first.code == 130:
        error = Interrupted(interrupted or "", checkpoint)
    raise error from (ChildTraceback(first.traceback) if first.traceback else None)


# ---- in the children ----


@contextlib.contextmanager
def joined(hardware: HardwareConfig) -> Iterator[None]:
    """Inside, this process is one of torch's process group, where it was started as one; the group it finds stays. The
    environment is `env.alone`'s."""
    check(hardware)
    with env.alone(), _group(hardware):
        yield


@contextlib.contextmanager
def _group(hardware: HardwareConfig) -> Iterator[None]:
    if not env.started():
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    env.check_complete()
    if threads := env.threads():
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate reads one number
    if env.rank() != 0:
        console.be_quiet()
    backend = "gloo"
    if hardware.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank())
        backend = "cpu:gloo,cuda:nccl"  # small messages go by gloo: they need not wait for GPU kernels
    dist.init_process_group(backend, timeout=timedelta(hours=TIMEOUT_HOURS))
    yield
    dist.destroy_process_group()  # not after a failure, when the others cannot take part


def end_with(parent: int) -> None:
    """Has the system end this process (as by SIGTERM) when its parent is gone, so that none is left behind. Linux."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)
