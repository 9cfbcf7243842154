"""What torchrun and SLURM say of this process's place, by environment variables, with a sentence for what is wrong.

Torch, transformers and accelerate read them too, wherever they are set, and fail on what is no number with a traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator

from sparseft.config import HardwareConfig
from sparseft.errors import UserError, shown

DEFAULT_PORT = 29500  # of the first machine, where several take part; MASTER_PORT says otherwise
MAX_PORT = 2**16 - 1
# What torch needs of a process that is one of several: torchrun, DeepSpeed's runner and `launch` set them all.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How many tasks `srun` has started. The other variables of a task, sbatch gives to the batch script itself too.
STEP_TASKS = "SLURM_STEP_NUM_TASKS"
# Settings that accelerate and transformers would take for the run's, beside those that it has.
SETTINGS = ("ACCELERATE_", "PARALLELISM_CONFIG_")
# What accelerate takes for a place among several processes where it is half of one, or MPI's.
HALF_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI_PLACES = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")


def started() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number among all of them; 0 where it is alone."""
    return int(os.environ["RANK"]) if started() else 0


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes a launcher has started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def processes(hardware: HardwareConfig) -> int:
    """How many processes there are in all, or will be."""
    return int(os.environ["WORLD_SIZE"]) if started() else hardware.all_processes


def number(name: str, least: int, most: int | None = None, why: str = "") -> int:
    """A variable as a whole number from `least` to `most` (None: any). UserError where it is none, or not set."""
    text = os.environ.get(name, "")
    digits = text.removeprefix("-") if least < 0 else text
    value = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else None
    if value is None or value < least or (most is not None and value > most):
        range_ = f"from {least} up" if most is None else f"{least} to {most}"
        raise UserError(f"{name}={shown(text)}: expected a whole number, {range_}{why}.")
    return value


def port() -> int:
    """MASTER_PORT, or the default where it is not set."""
    given = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
    value = int(given) if given.isascii() and given.isdecimal() and len(given) < 6 else 0
    if not 0 < value <= MAX_PORT:
        raise UserError(f"MASTER_PORT={shown(given)}: expected a port number, 1 to {MAX_PORT}.")
    return value


def threads() -> int | None:
    """OMP_NUM_THREADS, the first of a list (4,2: threads within threads); None where it is not set. UserError where it
    is no number."""
    given = os.environ.get("OMP_NUM_THREADS") or ""
    first = given.partition(",")[0].strip()
    if given and not (first.isascii() and first.isdecimal() and 0 < int(first)):
        raise UserError(f"OMP_NUM_THREADS={shown(given)}: expected a whole number, from 1 up.")
    return int(first) if given else None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, the environment has no settings of a training that are not the run's own, and without a launcher no place
    among several processes: accelerate would train by the ones and wait for the others."""
    places = () if started() else MPI_PLACES
    left_out = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(SETTINGS + places) or (places and name in HALF_PLACE)
    }
    for name in left_out:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(left_out)


def check_variables() -> None:
    """Refuses a place among the processes that is none, whoever has set it."""
    world = number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else None
    here = number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else None
    if "RANK" in os.environ:
        number("RANK", 0, None if world is None else world - 1, "" if world is None else f", as WORLD_SIZE is {world}")
    if "LOCAL_RANK" in os.environ:  # -1 stands for a process alone
        number("LOCAL_RANK", 0 if started() else -1, None if here is None else here - 1)
    if started():
        port()


def check_complete() -> None:
    """Refuses a place that torch could not join the others from."""
    if missing := [name for name in PLACE if not os.environ.get(name)]:
        raise UserError(
            f"RANK and WORLD_SIZE are set, as if a launcher had started this process, but not {' and '.join(missing)}: "
            f"expected {', '.join(PLACE)}, as torchrun sets them; for a process alone unset RANK and WORLD_SIZE."
        )


# ---- SLURM ----


def adopt_slurm(hardware: HardwareConfig) -> None:
    """Takes a task of `srun` that is one of the processes asked for as started: its place becomes torch's.

    UserError where srun has started another number of tasks than one for each machine or for each process.
    """
    if started() or STEP_TASKS not in os.environ:
        return
    total, machines, tasks = hardware.all_processes, hardware.num_machines, number(STEP_TASKS, 1)
    if tasks not in (machines, total):
        raise UserError(
            f"{STEP_TASKS}={tasks}: srun has started {tasks} task{'s' * (tasks > 1)}, but hardware.num_processes="
            f"{hardware.num_processes} on hardware.num_machines={machines} takes "
            f"{' or '.join(map(str, sorted({machines, total})))}; write `srun --nodes={machines} --ntasks-per-node=1 "
            f"sparseft …`, or unset {STEP_TASKS} where each task is a run of its own."
        )
    if tasks != total or total == 1:
        return
    place, local = number("SLURM_PROCID", 0, total - 1), number("SLURM_LOCALID", 0, hardware.num_processes - 1)
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(place), str(total), str(local)
    os.environ["LOCAL_WORLD_SIZE"] = str(hardware.num_processes)
    os.environ.setdefault("MASTER_ADDR", _slurm_hosts()[0])
    os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT))


def machine_place(hardware: HardwareConfig) -> tuple[int, str, int]:
    """(this machine's number, the first one's address, its port), from SLURM's variables."""
    if hardware.num_machines == 1:
        return 0, "localhost", 0
    counts = [name for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES") if os.environ.get(name)]
    if not counts or "SLURM_NODEID" not in os.environ or STEP_TASKS not in os.environ:
        raise UserError(
            f"hardware.num_machines={hardware.num_machines}: started by nothing that knows the other machines. Use "
            f"`srun --nodes={hardware.num_machines} --ntasks-per-node=1 sparseft …`, or torchrun or deepspeed "
            "--hostfile with `--module sparseft …` (docs/distributed.md)."
        )
    machines = number(counts[0], 1)
    if machines != hardware.num_machines:
        raise UserError(
            f"hardware.num_machines={hardware.num_machines}: SLURM has given this job {machines} machines; give the "
            "same number."
        )
    place = number("SLURM_NODEID", 0, machines - 1)
    return place, os.environ.get("MASTER_ADDR") or _slurm_hosts()[0], port()


def _slurm_hosts() -> list[str]:
    """The names of the job's machines. Raises UserError where SLURM's own tool does not list them."""
    listed = os.environ.get("SLURM_JOB_NODELIST", os.environ.get("SLURM_NODELIST", ""))
    if listed and not re.search(r"[\[,]", listed):
        return [listed]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SLURM_JOB_NODELIST={listed}: `scontrol show hostnames` does not say which machines these are ({error}); "
            "set MASTER_ADDR to the first one's name."
        ) from error
    return done.stdout.split()
