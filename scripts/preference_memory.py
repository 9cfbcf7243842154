#!/usr/bin/env python3
"""Peak memory of a few steps of DPO, in a process of its own each: one model in memory, or a second one as reference.

    python scripts/preference_memory.py MODEL [--steps 3] [--pairs 2] [--length 128]

| way | trains | reference |
| --- | --- | --- |
| sparseft | S2FT | the base under it, by slices |
| sparseft, second model | S2FT | a second model, as TRL loads one |
| peft | LoRA of as many parameters | the adapter turned off |
| trl | all weights | a second model, as TRL loads one |

`tensors` counts the storage of all tensors that are alive as the last step's backward pass begins, each once; what
autograd keeps for itself is not among them. `peak` is the process's largest resident size less what it had before the
model was loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from typing import Any

RANK = 17  # of SmolLM2-135M about as many parameters as 5 % of its linears
WAYS = ("sparseft", "sparseft, second model", "peft", "trl")


def storage() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    import torch

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in gc.get_objects():
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                whole = each.untyped_storage()
                found[whole.data_ptr()] = whole.nbytes()
    return sum(found.values())


def measure(way: str, model: str, steps: int, pairs: int, length: int) -> dict[str, Any]:
    """One way, in this process."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import sparseft

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    words = "The quick brown fox jumps over the lazy dog and rests. " * length
    ids = tokenizer(words)["input_ids"]
    half = length // 2
    prompt = tokenizer.decode(ids[:half])
    answers = [tokenizer.decode(ids[at : at + half - 4]) for at in (half, half + 5)]
    records = [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}] * (pairs * steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options: dict[str, Any] = {}
    if way.startswith("sparseft"):
        sparseft.attach(loaded, sparseft.S2FTConfig(sparsity=0.95, importance="random"))
        if way == "sparseft":
            options["ref_model"] = sparseft.reference_model(loaded)
    elif way == "peft":
        options["peft_config"] = peft.LoraConfig(r=RANK, target_modules="all-linear")
    trained = 0

    class Watched(DPOTrainer):
        most = 0

        def compute_loss(self, *args: Any, **given: Any) -> Any:
            loss = super().compute_loss(*args, **given)
            if self.state.global_step == steps - 1:
                self.most = storage()
            return loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            loaded,
            args=DPOConfig(
                folder, per_device_train_batch_size=pairs, max_steps=steps, max_length=length, use_cpu=True, bf16=False,
                report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
            ),
            train_dataset=Dataset.from_list(records), processing_class=tokenizer, **options,
        )  # fmt: skip
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"way": way, "trained": trained, "tensors": trainer.most, "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--way", choices=WAYS, help="this one alone, as JSON")
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(measure(given.way, given.model, given.steps, given.pairs, given.length)))
        return 0
    print(f"{'way':<24}{'trained':>14}{'tensors':>12}{'peak':>12}")
    for way in WAYS:
        words = [sys.executable, __file__, given.model, "--way", way]
        words += [f"--{name}={getattr(given, name)}" for name in ("steps", "pairs", "length")]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = "".join(f"{found[name] / 2**20:>8,.0f} MiB" for name in ("tensors", "peak"))
        print(f"{way:<24}{found['trained']:>14,}{sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
