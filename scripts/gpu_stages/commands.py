"""What a user types, on the bundled model: preprocess, train by each method, kill and resume, too large a batch.

Each command has a process of its own, forked from this one, which never uses the device itself.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_stages.findings import Findings, at_most
from gpu_stages.runner import in_child

# Small, but of all kinds: fp32, so that a device may be compared with the CPU.
COMMON = ("model.dtype=float32", "trainer.max_steps=6", "trainer.batch_size=2", "trainer.gradient_accumulation=2",
          "trainer.warmup_steps=0", "trainer.max_length=128", "dataset.max_examples=60")  # fmt: skip
METHODS = {
    "s2ft": ("method=s2ft", "sparsity=0.95"),
    "sylva": ("method=sylva", "sparsity=0.95", "method.num_samples=8"),
    "lora": ("method=lora", "sparsity=0.95", "method.dropout=0"),
    "full": ("method=full", "trainer.learning_rate=1e-3"),
}
KILLED = "sylva"  # the run that is killed and resumed
SAVES = ("trainer.save_steps=2", "trainer.max_steps=12", "trainer.save_total_limit=9")
TOO_LARGE = ("trainer.batch_size=256", "trainer.gradient_accumulation=1", "dataset.max_examples=400",
             "dataset.eval_fraction=0")  # fmt: skip
SLIVER = 0.002  # of the device's memory: what the batch that does not fit is given


def work(findings: Findings) -> None:
    chosen = ("s2ft", KILLED) if findings.dry else tuple(METHODS)
    os.chdir(findings.scratch)
    words = [*COMMON, *METHODS[KILLED], f"hardware.device={findings.device}", "cache_dir=cache"]
    code, _ = _command("preprocess", words)
    findings.fact("preprocess: exit code", code == 0, str(code), "0")
    for method in chosen:
        with findings.attempt(method):
            _train(findings, method)
    with findings.attempt("kill and resume"):
        _kill_and_resume(findings)
    findings.cuda_alone("too large a batch", lambda: _too_large(findings))


def _train(findings: Findings, method: str) -> None:
    """On the device, and on the CPU beside it."""
    losses = {}
    for device in dict.fromkeys((findings.device, "cpu")):
        words = [*COMMON, *METHODS[method], f"hardware.device={device}", f"output_dir={method}-{device}",
                 f"cache_dir=cache-{device}"]  # fmt: skip
        code, _ = _command("train", words)
        if device == findings.device or code:
            findings.fact(f"train {method} on {device}: exit code", code == 0, str(code), "0")
        if code:
            return
        losses[device] = _summary(f"{method}-{device}")["eval_loss_after"]
    if len(losses) == 2:
        difference = abs(losses[findings.device] - losses["cpu"])
        findings.number(f"train {method}: eval loss, difference to the CPU's", difference, "", at_most(1e-3))


def _kill_and_resume(findings: Findings) -> None:
    """A run killed after its first checkpoint goes on to where the whole run ends."""
    words = [*COMMON, *METHODS[KILLED], *SAVES, f"hardware.device={findings.device}", "cache_dir=cache"]
    code, _ = _command("train", [*words, "output_dir=whole"])
    findings.fact("whole run: exit code", code == 0, str(code), "0")
    code, why = _command("train", [*words, "output_dir=killed"], kill_at=Path("killed/checkpoints/checkpoint-2"))
    findings.fact("killed run", code is None and "SIGKILL" in why, why or f"exit code {code}", "killed by SIGKILL")
    done = sorted(int(path.name.split("-")[1]) for path in Path("killed/checkpoints").glob("checkpoint-*"))
    findings.note("checkpoints that the kill left", ", ".join(map(str, done)))
    code, _ = _command("train", [*words, "output_dir=killed", "trainer.resume=auto"])
    findings.fact("resumed run: exit code", code == 0, str(code), "0")
    from safetensors.torch import load_file

    whole, resumed = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "killed"))
    same = whole.keys() == resumed.keys()
    furthest = max((float((whole[name] - resumed[name]).abs().max()) for name in whole if same), default=float("nan"))
    findings.fact("resumed adapter, furthest entry", same and furthest <= 1e-6, f"{furthest:.3g}", "≤ 1e-06")


def _too_large(findings: Findings) -> None:
    def little() -> None:
        import torch

        torch.cuda.set_per_process_memory_fraction(SLIVER)

    words = [*COMMON, *METHODS["s2ft"], *TOO_LARGE, "hardware.device=cuda", "output_dir=large"]
    code, _ = _command("train", words, first=little)
    findings.fact("too large a batch: exit code", code == 1, str(code), "1")
    said = Path("last.log").read_text(errors="replace")
    advised = "memory ran out" in said and "gradient_accumulation=2 take the same" in said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    findings.fact("too large a batch: advice", advised, lines[-1][:200] if lines else "none", "what would fit")


def _command(
    command: str, words: Sequence[str], *, kill_at: Path | None = None, first: object = None
) -> tuple[int | None, str]:
    """(exit code, "") of `sparseft COMMAND WORDS`, or (None, how it ended). What it said is `last.log`, and in the log.

    kill_at: the process kills itself as soon as that path is there. first: called in the process before.
    """
    code, log = Path("last.code"), Path("last.log")
    for path in (code, log):
        path.unlink(missing_ok=True)

    def do() -> None:
        from sparseft.cli.app import main

        if callable(first):
            first()
        if kill_at is not None:
            threading.Thread(target=_kill_when_there, args=(kill_at,), daemon=True).start()
        code.write_text(str(main([command, *words])))

    _, why = in_child(do, 600, log=log, group=False)
    print(f"$ sparseft {command} {' '.join(words)}\n{log.read_text(errors='replace')}", flush=True)
    return (int(code.read_text()), "") if code.is_file() else (None, why)


def _kill_when_there(path: Path) -> None:
    while not path.exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def _summary(run: str) -> dict[str, float]:
    return json.loads(Path(run, "summary.json").read_text())
