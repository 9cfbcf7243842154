"""TRL's DPOTrainer with one model in memory: the reference is the base under what trains.

python docs/examples/trl_dpo.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/trl_dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --steps 100
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def pairs_of(path):
    """JSON lines with prompt, chosen and rejected; without a file, answers of the bundled data and wrong ones."""
    if path is not None:
        return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    records = json.loads((BUNDLED / "data/commonsense/train.json").read_text())
    answers = sorted({each["output"] for each in records})
    return [
        {"prompt": each["instruction"] + "\n", "chosen": each["output"], "rejected": wrong}
        for each in records[:64]
        for wrong in answers[:2]
        if wrong != each["output"]
    ]


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--data", default=None, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--out", default="dpo-example")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)  # 2e-5 for a model of billions
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.95))

    pairs = pairs_of(args.data)
    held_out = max(1, len(pairs) // 10)
    on_gpu = torch.cuda.is_available()
    trainer = DPOTrainer(
        model,
        ref_model=sparseft.reference_model(model),  # no second model: base and base + delta take turns in the weights
        args=DPOConfig(
            output_dir=args.out,
            per_device_train_batch_size=4,
            learning_rate=args.learning_rate,
            max_steps=args.steps,
            max_length=512,
            logging_steps=1,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs[held_out:]),
        eval_dataset=Dataset.from_list(pairs[:held_out]),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(f"{args.out}/final")  # a Hugging Face model, and in final/adapter the adapter
    for name in ("rewards/margins", "rewards/accuracies"):
        print(f"{name} on held-out pairs: {before[f'eval_{name}']:.3f} before, {after[f'eval_{name}']:.3f} after")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
