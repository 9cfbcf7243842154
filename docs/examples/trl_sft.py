"""TRL's SFTTrainer, with a model that trains the most important blocks of its weights.

python docs/examples/trl_sft.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 100
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--data", default=str(BUNDLED / "data/commonsense/train.json"), help="instruction and output")
    parser.add_argument("--out", default="trl-example")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    records = json.loads(Path(args.data).read_text())
    pairs = [{"prompt": each["instruction"] + "\n", "completion": each["output"]} for each in records]

    # Sylva scores the weights on a few batches, as the model takes them, before anything trains.
    texts = [tokenizer(pair["prompt"] + pair["completion"], return_tensors="pt").input_ids for pair in pairs[:16]]
    config = sparseft.SylvaConfig(sparsity=0.95, num_samples=16, block_size=16)
    selection = sparseft.compute_selection(model, config, [{"input_ids": ids, "labels": ids} for ids in texts])
    sparseft.attach(model, config, selection)

    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model,  # attached already, so no peft_config: PEFT would freeze what sparseft trains
        args=SFTConfig(
            output_dir=args.out,
            per_device_train_batch_size=4,
            learning_rate=5e-3,  # 2e-4 for a model of billions
            max_steps=args.steps,
            max_length=256,
            logging_steps=1,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{args.out}/final")  # a Hugging Face model, and in final/adapter the adapter
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss on the answers: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {args.steps}")
    return {"losses": losses}


if __name__ == "__main__":
    main()
