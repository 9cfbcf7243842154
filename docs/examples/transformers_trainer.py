"""transformers' own Trainer, with a model that trains a twentieth of its weights.

python docs/examples/transformers_trainer.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/transformers_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 100
"""

import argparse
import json
from pathlib import Path

import transformers

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--data", default=str(BUNDLED / "data/commonsense/train.json"), help="instruction and output")
    parser.add_argument("--out", default="trainer-example")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")

    # In place: the model stays what it is to everybody else, and all but a few heads and channels is frozen.
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.95))

    def encode(record):
        prompt = tokenizer(record["instruction"] + "\n").input_ids
        answer = tokenizer(record["output"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    examples = [encode(record) for record in json.loads(Path(args.data).read_text())]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=args.out,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,  # 2e-4 for a model of billions; deltas take higher rates than all weights would
            max_steps=args.steps,
            logging_steps=1,
            save_steps=args.steps // 2,
            report_to=[],
        ),
        train_dataset=examples[32:],
        eval_dataset=examples[:32],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()  # and later: trainer.train(resume_from_checkpoint=True), of a model attached in the same way
    after = trainer.evaluate()["eval_loss"]

    # The adapter: what `load_adapter`, `sparseft export` and `sparseft eval --adapter` read.
    sparseft.save_adapter(model, f"{args.out}/adapter")
    # The whole model with what was learnt in its weights, for anything that loads a model.
    sparseft.merge(model).save_pretrained(f"{args.out}/merged")
    tokenizer.save_pretrained(f"{args.out}/merged")
    print(f"loss on 32 held-out answers: {before:.3f} before, {after:.3f} after")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
