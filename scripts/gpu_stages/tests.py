"""The project's own tests that need a device, and its kernels under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_stages.findings import Findings, Skip

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("tests/kernels/test_triton.py", "tests/training/test_optimizer.py")
SANITIZED = "test_auto_takes_the_kernel_on_cuda or (test_on_the_gpu_as_torch_does and dtype1)"
MARK = "mark.gpu"  # files that have tests for a device
WHOLE = "tests/gpu"  # layers, models, runs: the same tests as on the CPU, on the device
SMALL = "tests/gpu/test_layers.py"
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|deselected)")


def kernels(findings: Findings) -> None:
    """What is marked `gpu` beside `tests/gpu`, then the kernels' files whole: on a device they run compiled."""
    _tests(findings, "marked gpu", "-m", "gpu", *(() if findings.dry else _in_parallel(4)), *_marked())
    if findings.dry:
        findings.skip("kernels' files whole, compiled", "needs CUDA")
    else:
        _tests(findings, "kernels' files whole, compiled", "-m", "not gpu", *_in_parallel(4), *KERNELS)


def _marked() -> list[str]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    named = [path.relative_to(ROOT).as_posix() for path in files if MARK in path.read_text(encoding="utf-8")]
    return [path for path in named if not path.startswith(WHOLE)]


def numerics(findings: Findings) -> None:
    """Layers, models and runs on the device against `nn.Linear`, float64 and the CPU."""
    if findings.dry:  # they run there with all the other tests
        _tests(findings, "layers, as on the CPU", "-m", "not gpu", "-k", "twenty_steps or beside", SMALL)
    else:
        _tests(findings, "layers, models, runs", "-m", "gpu", *_in_parallel(8), WHOLE)


def sanitizer(findings: Findings) -> None:
    """Each kernel under memcheck, in tests without a profiler, which would want the same hooks of the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer is not on the PATH")
    memcheck = [tool, "--tool", "memcheck", "--target-processes", "all"]
    code, output = _run(findings, *memcheck, *_pytest("-m", "gpu", "-k", SANITIZED, *KERNELS))
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
    passed = _counts(output).get("passed", 0)
    found = f"{sum(errors)} errors, {passed} passed" if errors else f"no summary, code {code}"
    fine = bool(errors) and not any(errors) and code == 0 and passed >= 2
    findings.fact("memcheck: blocks, optimizer", fine, found, "0 errors")


def _tests(findings: Findings, what: str, *arguments: str) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    code, output = _run(findings, *_pytest(*arguments))
    counts = _counts(output)
    found = ", ".join(f"{count} {name}" for name, count in counts.items()) or f"nothing, code {code}"
    bad = [name for name in ("failed", "error", "errors") if counts.get(name)]
    ran = counts.get("passed", 0) > 0 or (findings.dry and counts.get("skipped", 0) > 0)
    findings.fact(what, code == 0 and not bad and ran, found, "no failures")
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            findings.fact("  " + line.split(" - ")[0][:200], False, line.partition(" - ")[2][:200])


def _run(findings: Findings, *command: str) -> tuple[int, str]:
    """(exit code, output) of a command, which is in the log as it comes: a limit may end it."""
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=_environment(findings.dry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def _counts(output: str) -> dict[str, int]:
    """`{"passed": 52}` of pytest's last line."""
    for line in reversed(output.splitlines()):
        if found := COUNT.findall(line):
            return {name: int(count) for count, name in found}
    return {}


def _pytest(*arguments: str) -> list[str]:
    verbose = ("-v", "--no-header")  # a test that hangs is the last one named
    return [sys.executable, "-m", "pytest", *verbose, "-p", "no:cacheprovider", *arguments]


def _in_parallel(processes: int) -> Sequence[str]:
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(processes), "--dist", "worksteal")


def _environment(dry: bool) -> dict[str, str]:
    """The checkout first on the path, also for what the tests start elsewhere; without a device they fail, not skip."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    changes = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | ({} if dry else {"SPARSEFT_REQUIRE_GPU": "1"})
    return os.environ | changes
