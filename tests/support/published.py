"""A finished run's folder, as `train` and `eval` leave one, around an adapter: with facts that tests know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

HOME = "/home/alice/secret"  # where the run's base and data lay: nothing that is published may say so


def finished_run(
    adapter: Path, folder: Path, *, base: str = f"{HOME}/tiny-base", data: str = f"{HOME}/own.json"
) -> Path:
    """A run of four steps. base, data: what its files say that it was trained on; hub ids, or paths below HOME."""
    folder.mkdir()
    shutil.copytree(adapter, folder / "adapter")
    _set(folder / "adapter/adapter_config.json", base_model=base)
    _write(folder / "summary.json", {
        "method": "sylva", "model": base, "dataset": data, "sparsity": 0.9, "scope": None,
        "trainable_parameters": 1200, "scope_parameters": 30_000, "total_parameters": 40_000, "export_rank": 40,
        "steps": 4, "tokens": 4321, "train_seconds": 7200.0, "peak_memory_bytes": 3 << 30, "train_loss": 1.0,
        "eval_loss_before": 2.5, "eval_loss_after": 1.25, "seed": 17, "learning_rate": 2e-4, "warnings": [],
    })  # fmt: skip
    (folder / "config.yaml").write_text(
        f"model: {{name: x, path: {base}, revision: abc123}}\n"
        f"dataset: {{name: commonsense, train_path: {data}, language: en}}\n"
        "method: {name: sylva, sparsity: 0.9}\n"
        "trainer: {batch_size: 2, gradient_accumulation: 3, max_length: 96, optimizer: adamw_torch, scheduler: linear,"
        " warmup_steps: 1, weight_decay: 0.0, sample_prompts: [what I asked]}\n"
        f"seed: 17\noutput_dir: {HOME}/run\n"
    )
    _write(folder / "environment.json", {
        "versions": {"sparseft": "0.1.0", "torch": "2.13.0"}, "commit": "0123456789abcdef", "device": "cuda:0",
        "device_name": "NVIDIA H100", "dtype": "bfloat16", "world_size": 2, "cpu_count": 8,
        "command_line": f"sparseft train dataset=commonsense model.path={base}", "started": "2026-01-31T10:00:00+00:00",
        "data": {"train": data, "eval": None, "format": "alpaca", "examples": 439},
    })  # fmt: skip
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    (folder / "report.html").write_text("<p>an answer")
    (folder / "train_questions.safetensors").write_bytes(b"hashes")
    (folder / "checkpoints/checkpoint-4").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-4/optimizer.pt").write_bytes(b"pickle")
    (folder / "eval").mkdir()
    boolq = {"accuracy": 0.75, "stderr": 0.02, "samples": 400, "shots": 0, "metric": "acc,extract", "split": "test",
             "base": 0.5, "base_stderr": 0.025, "difference_stderr": 0.015, "data": f"{HOME}/boolq/test.json",
             "train_overlap": 3}  # fmt: skip
    mmlu = {"accuracy": 0.40, "stderr": 0.004, "samples": 14_042, "shots": 5, "metric": "acc,none", "split": "test",
            "base": 0.46, "base_stderr": 0.004, "difference_stderr": 0.003, "data": "cais/mmlu"}  # fmt: skip
    _write(folder / "eval/boolq.json", {"task": "boolq", "tasks": {"boolq": boolq}, "sparseft": {"evaluated": HOME}})
    _write(folder / "eval/mmlu.json", {"task": "mmlu", "tasks": {"mmlu": mmlu}})
    (folder / "eval/boolq.samples.jsonl").write_text('{"prompt": "is it so?", "answer": "true"}\n')
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _set(path: Path, **values: Any) -> None:
    _write(path, json.loads(path.read_text()) | values)
