"""The environment variables by which torchrun and SLURM say a process's place, read with a sentence for what is wrong.

Torch, transformers and accelerate read them too, wherever they are set, and fail on what is no number with a traceback.
"""

from __future__ import annotations

import os

from sparseft.errors import UserError, shown

DEFAULT_PORT = 29500  # of the first machine, where several take part; MASTER_PORT says otherwise
MAX_PORT = 2**16 - 1
# What torch needs of a process that is one of several: torchrun, DeepSpeed's runner and `launch` set them all.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number(name: str, least: int, most: int | None = None, why: str = "") -> int:
    """A variable as a whole number from `least` to `most` (null: any). UserError where it is none, or not set."""
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


def check_place() -> None:
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
