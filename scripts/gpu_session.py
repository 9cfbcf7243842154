#!/usr/bin/env python3
"""Everything that only a GPU can show, in one session of minutes: what is found beside what was expected.

Stages run one after another, each in a process of its own and within its limit; one that fails, hangs or is killed ends
nothing but itself. After each, `session.json` and `session.md` in the folder of --out hold all that is known.

Needs a checkout, torch, triton, transformers, peft and hydra-core, no network. Exit codes: 0 all stages ran, whatever
they found; 1 one failed (in a dry session also: found what must not be on any device); 2 the options were wrong; 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the latter for support/syncs.py
APART = "SPARSEFT_SESSION_APART"  # set where a forked process cannot use what this one has imported

from gpu_stages.findings import FAILED, OFF  # noqa: E402
from gpu_stages.hidden import hide  # noqa: E402
from gpu_stages.runner import COLUMNS, Stage, in_child, run, table  # noqa: E402
from gpu_stages.table import STAGES  # noqa: E402

from sparseft.errors import UserError, nearest  # noqa: E402
from sparseft.runs.folder import check_writable  # noqa: E402


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def options(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = _Parser(prog="gpu_session.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to fill")
    parser.add_argument("--seconds", type=float, default=780.0, help="for all stages together (780)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, everything cut down, numbers not judged")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STAGE",
        help="run these, keep of the others what the folder holds: " + ", ".join(stage.name for stage in STAGES),
    )  # fmt: skip
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = ("--out", "--seconds", "--dry", "--only", "--help")
        raise UserError(f"unknown option '{unknown[0]}'.{nearest(unknown[0], known)}")
    names = [stage.name for stage in STAGES]
    for name in chosen.only:
        if name not in names:
            raise UserError(f"--only {name}: no such stage.{nearest(name, names)}")
    if not chosen.seconds > 0:
        raise UserError(f"--seconds {chosen.seconds:g}: expected more than 0.")
    if chosen.out.exists() and not chosen.out.is_dir():
        raise UserError(f"--out {chosen.out}: expected a folder, this is a file.")
    check_writable(chosen.out, "--out")
    return chosen


def prepare(dry: bool) -> str:
    """Imports what stages need, so that they find it there; returns the device's name, asked for in another process.

    A process that has touched a device cannot be forked, and some library may do so on import: then this program starts
    again and lets each stage import for itself.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks the driver without starting it
    os.environ["HF_HUB_OFFLINE"] = "1"
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads cost more than they bring
        hide()
    if APART not in os.environ:
        import peft  # noqa: F401
        import transformers

        import sparseft.commands.bench
        import sparseft.commands.plan
        import sparseft.report.page  # noqa: F401

        transformers.utils.logging.disable_progress_bar()
    if dry:
        return "cpu"
    with tempfile.TemporaryDirectory() as made:
        name = Path(made, "name")
        _, why = in_child(lambda: _touch(name), 120, log=Path(made, "log"))
        if name.is_file():
            return name.read_text()
    if APART in os.environ:
        raise UserError(f"no CUDA device can be used ({why}): --dry runs all stages on the CPU, cut down.")
    os.environ[APART] = "1"
    os.execv(sys.executable, sys.orig_argv)


def _touch(name: Path) -> None:
    """Uses the device, and leaves its name."""
    import torch

    torch.ones(1, device="cuda").add_(1).item()
    name.write_text(torch.cuda.get_device_name())


def facts(device: str) -> dict[str, Any]:
    """What the session ran with."""
    from sparseft.runs.environment import environment

    about = environment(device, "", 1)
    return {
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": about["commit"],
        "platform": about["platform"],
        "versions": about["versions"],
    }


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    try:
        chosen = options(arguments)
        about = facts(prepare(chosen.dry))
        spent = time.monotonic() - start
        content = run(STAGES, chosen.out, chosen.seconds, spent=spent, facts=about, dry=chosen.dry, only=chosen.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: what was found is in {chosen.out}", file=sys.stderr)
        return 130
    show(content)
    print(f"session: {chosen.out}/session.md")
    return code(content, STAGES, chosen.only)


def show(content: dict[str, Any]) -> None:
    """The table on stdout."""
    from sparseft import console

    console.table("Found against expected", list(COLUMNS), table(content))


def code(content: dict[str, Any], stages: tuple[Stage, ...], only: list[str]) -> int:
    """1 where one of the stages that were to run failed; numbers that are off fail none."""
    bad = {FAILED, OFF} if content["dry"] else {FAILED}
    ran = [entry for entry in content["stages"] if not only or entry["name"] in only]
    return int(any(entry["verdict"] in bad for entry in ran))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
