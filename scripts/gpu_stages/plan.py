"""Whether `train --plan` foresees what a step then takes."""

from __future__ import annotations

import torch
import transformers

from gpu_stages.findings import Findings, Skip, between
from gpu_stages.models import SPARSITY, shape_of
from sparseft.compose.run_config import compose
from sparseft.training import memory_plan

# Rows of the step's stage, by the method of the plan.
ROWS = {"s2ft": "s2ft: peak", "sylva": "sylva: peak", "lora": "lora: peak"}
STEP = "step"


def work(findings: Findings) -> None:
    measured = findings.earlier(STEP)
    if not any(row in measured for row in ROWS.values()):
        raise Skip(f"there is no peak of the stage {STEP} to compare with")
    config = transformers.LlamaConfig(**shape_of("llama2-7b", findings.dry))
    length = 32 if findings.dry else 512
    for method, row in ROWS.items():
        if row not in measured:
            findings.skip(method, "its step was not measured")
            continue
        with findings.attempt(method):
            made = compose(
                "train",
                ["model.dtype=bfloat16", f"method={method}", f"sparsity={SPARSITY}",
                 f"hardware.device={findings.device}", "trainer.batch_size=1", f"trainer.max_length={length}",
                 "trainer.optimizer=adamw_torch_fused"],
            )  # fmt: skip
            shape = memory_plan.trainable_shape(made, config, torch.bfloat16)
            planned = memory_plan.step_memory(made, shape, batch=1, length=length).total / 1e9
            findings.number(f"{method}: planned", planned, "GB")
            findings.number(f"{method}: planned ÷ measured", planned / measured[row], "", between(0.85, 1.15))
