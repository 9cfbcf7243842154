"""The presets of the papers' tables, and what makes each of them small."""

from __future__ import annotations

TABLES = {
    **{f"{model}_{data}": ("s2ft", "lora", "dora", "full") for model in ("llama2", "llama3")
       for data in ("commonsense", "arithmetic")},
    "llama7b_oasst1": ("sylva", "lora", "full"),
    "llama7b_oasst1_linear": ("sylva", "lora"),
    "llama2_alpaca": ("s2ft", "lora", "full"),
    "mistral_alpaca": ("s2ft", "lora", "full"),
}  # fmt: skip


PRESETS = [f"{method}_{row}" for row, methods in TABLES.items() for method in methods]


SMALL = [  # the bundled model is 96 wide and its sequences are short
    "model.path=bundled:tiny", "model.dtype=float32", "model.tokenizer=null", "hardware=cpu",
    "trainer.max_steps=2", "trainer.batch_size=2", "trainer.gradient_accumulation=1", "trainer.max_length=64",
    "trainer.warmup_steps=0", "trainer.logging_steps=1", "dataset.max_examples=12", "dataset.eval_fraction=0.2",
    "trainer.eval_task=null",
]  # fmt: skip
