"""TRL's trainers with attached models, beside the same trainers with the dense oracle of `test_other_loops.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import sparseft
from sparseft.config import BUNDLED_ROOT
from sparseft.kernels import reference
from sparseft.layers import sparse_layers

trl = pytest.importorskip("trl")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
CONFIGS = {
    "s2ft": sparseft.S2FTConfig(sparsity=0.9, importance="random"),
    "sylva": sparseft.SylvaConfig(sparsity=0.9, importance="random"),
}
SUMS = [(a, b) for a in range(2, 6) for b in range(3, 9)]
TEXTS = [{"text": f"{a} plus {b} is {a + b}."} for a, b in SUMS]
CHATS = [
    {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"{a + b}"}]}
    for a, b in SUMS
]
CHOICES = [{"prompt": f"{a}+{b}=", "chosen": f" {a + b}.", "rejected": f" {a * b}."} for a, b in SUMS]


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny", dtype=torch.float32)


def masked(method: str) -> Any:
    """The plain model, in which only what the method trains gets a gradient."""
    model = base().requires_grad_(False)
    for name, layer in sparse_layers(sparseft.attach(base(), CONFIGS[method])).items():
        mask = torch.zeros(layer.out_features, layer.in_features)
        for pattern in layer.patterns.values():
            reference.scatter_(mask, pattern.kind, pattern.index, torch.ones_like(pattern.delta), pattern.block_size)
        model.get_submodule(name).weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    return model


def losses(trainer: type, config: type, model: Any, data: Any, folder: Any, options: dict[str, Any]) -> list[float]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
    tokenizer.chat_template = TEMPLATE
    arguments = config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_steps=3, per_device_train_batch_size=4,
        logging_steps=1, learning_rate=1e-2, disable_tqdm=True, save_strategy="no", max_length=64, **options,
    )  # fmt: skip
    made = trainer(model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    made.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("method", "name", "data", "options"),
    [
        ("sylva", "SFT", TEXTS, {"packing": True}),
        ("s2ft", "SFT", CHATS, {"assistant_only_loss": True, "gradient_checkpointing": False}),
        ("s2ft", "DPO", CHOICES, {}),
        ("sylva", "DPO", CHOICES, {"precompute_ref_log_probs": True}),
    ],
)
def test_a_trl_trainer_trains_as_the_oracle(method, name, data, options, tmp_path):
    kinds = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    attached = sparseft.attach(base(), CONFIGS[method])
    ours = losses(*kinds, attached, data, tmp_path / "ours", options)
    assert ours == pytest.approx(losses(*kinds, masked(method), data, tmp_path / "dense", options), abs=1e-5)
    assert ours[-1] < ours[0]
