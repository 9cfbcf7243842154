"""Kernels compiled to machine code: needs no device, but a process in which Triton has not its interpreter on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.places import ROOT

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200


@dataclass
class Compiled:
    """What one kernel came to: registers a thread, bytes of them spilled to memory, and its PTX."""

    registers: int
    spilled: int
    ptx: str


def run_compiling(code: str, folder: Path) -> str:
    """What `code`, which may import this module, prints in a process where Triton compiles; its cache is `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], architecture: int, **options: Any
) -> Compiled:
    """`kernel` for NVIDIA GPUs of `architecture` (90: sm_90); `types` of its arguments, as "*fp32" or "i32"; arguments'
    addresses are taken to be multiples of 16, as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget

    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, kind in types.items() if kind[0] == "*"}
    source = triton.compiler.ASTSource(
        kernel, dict(types) | dict.fromkeys(constants, "constexpr"), dict(constants), attrs=aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", used)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack + local, made.asm["ptx"])
