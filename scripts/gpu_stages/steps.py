"""A training step of every method, by `bench train`: LLaMA-2 7B at 512 tokens, LLaMA-3 8B at 4 x 2048."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from gpu_stages.clock import waited
from gpu_stages.findings import Expected, Findings, at_most, between, near
from gpu_stages.models import SPARSITY, batch_of, free, made, shape_of, trained_by
from sparseft.bench.timing import absent
from sparseft.commands import bench
from sparseft.compose.run_config import compose

NARROW = "s2ft d_ratio=0.03"  # the paper's own budget for a step: 3 % of down's channels
METHODS = ("floor", NARROW, "s2ft", "s2ft layout=permuted", "sylva", "lora")
SEVEN_FLOOR = {  # ÷ floor
    NARROW: at_most(1.04),
    "s2ft": at_most(1.08),
    "s2ft layout=permuted": at_most(1.05),
    "sylva": at_most(1.08),
    "lora": between(1.7, 2.1),
}
EIGHT_FLOOR = {"s2ft": at_most(1.03), "sylva": at_most(1.03), "lora": near(1.8, 0.15)}
AGAINST_LORA = {NARROW: at_most(0.75), "s2ft": at_most(0.75), "sylva": at_most(0.85)}


def seven(findings: Findings) -> None:
    """The 7B row, `full` last and alone, LoRA in bf16 beside it, then one profile each."""
    rows = _measured(findings, "llama2-7b", METHODS, batch_size=1, length=512, rounds=12)
    floor = _table(findings, rows, SEVEN_FLOOR)
    if floor is not None:
        findings.number("floor", 1000 * floor, "ms", between(34, 45))
    _memory(findings, rows, most=17.5)
    with findings.attempt("full, alone"):
        _table(findings, _measured(findings, "llama2-7b", ("full",), batch_size=1, length=512, rounds=4), {})
    with findings.attempt("lora rank 40 in bf16, alone"):
        _narrow_lora(findings, floor)
    with findings.attempt("profiles"):
        _measured(findings, "llama2-7b", ("floor", "s2ft", "sylva", "lora"), 1, 512, rounds=1, profile=True)
        findings.note("profiles", f"{len(list(findings.files.glob('trace-*')))} traces are kept")


def eight(findings: Findings) -> None:
    """Where the arithmetic is larger than the host's part."""
    rows = _measured(findings, "llama3-8b", ("floor", "s2ft", "sylva", "lora"), batch_size=4, length=2048, rounds=4)
    floor = _table(findings, rows, EIGHT_FLOOR)
    if floor is not None:
        findings.number("floor", 1000 * floor, "ms", near(570, 0.15))
    _memory(findings, rows)


def words(findings: Findings, shape: str, batch_size: int, length: int) -> list[str]:
    """The settings of a row: of a dry session a small model on the CPU."""
    size = ["bench.width=128", "bench.depth=2", "bench.length=32"]
    if not findings.dry:
        size = [f"bench.shape={shape}", f"bench.length={length}"]
    return [*size, f"bench.batch_size={batch_size}", f"sparsity={SPARSITY}", "model.dtype=bfloat16",
            f"hardware.device={findings.device}"]  # fmt: skip


def _measured(
    findings: Findings,
    shape: str,
    methods: tuple[str, ...],
    batch_size: int,
    length: int,
    rounds: int,
    profile: bool = False,
) -> dict[str, Any]:
    rounds = 1 if findings.dry else rounds
    out = findings.scratch / ("profiled" if profile else "-".join(methods)[:40].replace(" ", ""))
    listed = ",".join(f'"{method}"' for method in methods)
    config = compose(
        "bench",
        [*words(findings, shape, batch_size, length), f"bench.methods=[{listed}]", f"bench.steps={rounds}",
         f"bench.warmup_steps={1 if profile or findings.dry else 2}", f"bench.profile={profile}", f"output_dir={out}",
         f"cache_dir={findings.scratch / 'cache'}"],
    )  # fmt: skip
    try:
        return bench.run(config, "train")["methods"]
    finally:
        for path in out.glob("*.json*"):
            shutil.copy(path, findings.files / (path.name if "trace" in path.name else f"{out.name}-{path.name}"))
        free()


def _table(findings: Findings, rows: dict[str, Any], ratios: dict[str, Expected]) -> float | None:
    """Rows of times; returns the floor's seconds."""
    for name, row in rows.items():
        if (why := absent(row)) is not None:
            findings.fact(name, False, why, "a row")
            continue
        findings.number(f"{name}: step", 1000 * row["step_seconds"], "ms")
        if name != "floor" and "floor" in row["ratio_to"]:
            findings.number(f"{name} ÷ floor", row["ratio_to"]["floor"], "", ratios.get(name))
        if name in AGAINST_LORA and "lora" in row["ratio_to"]:
            findings.number(f"{name} ÷ lora", row["ratio_to"]["lora"], "", AGAINST_LORA[name])
    floor = rows.get("floor", {})
    return floor.get("step_seconds")


def _memory(findings: Findings, rows: dict[str, Any], most: float | None = None) -> None:
    """Peaks, of S2FT `most` GB, and what is saved for backward beside LoRA's."""
    saved = {name: row.get("saved_bytes") for name, row in rows.items()}
    for name, row in rows.items():
        if (peak := row.get("peak_memory_bytes")) is not None:
            expected = at_most(most) if most is not None and name in ("s2ft", NARROW) else None
            findings.number(f"{name}: peak", peak / 1e9, "GB", expected)
        if saved.get("lora") and saved[name] and name in AGAINST_LORA:
            expected = at_most(0.85 if name == "sylva" else 0.7)
            findings.number(f"{name}: saved ÷ lora", saved[name] / saved["lora"], "", expected)


def _narrow_lora(findings: Findings, floor: float | None) -> None:
    """peft keeps its adapters in fp32; here they are in the model's dtype."""
    model = made(shape_of("llama2-7b", findings.dry), findings.device)
    batch = batch_of(model, 1, 32 if findings.dry else 512)
    with trained_by("lora rank 40, in bf16", model, batch) as step:
        seconds = waited(step, 1 if findings.dry else 8)
    findings.number("lora rank 40, in bf16: step", 1000 * seconds, "ms")
    if floor:
        findings.number("lora rank 40, in bf16 ÷ floor", seconds / floor, "", near(1.4, 0.15))
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
