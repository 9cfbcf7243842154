"""From a sparse adapter to PEFT: train, `sparseft export --format peft-lora`, `PeftModel.from_pretrained`.

python docs/examples/peft_load.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/peft_load.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--text", default="The jaxo is made of wood. The larko makes tea.")
    parser.add_argument("--out", default="peft-example")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    batch = tokenizer(args.text, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits

    # A row or a column that trains costs a LoRA rank 1; max_rank keeps the export as small as an engine takes it.
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.98, max_rank=64))
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    for _ in range(args.steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparseft.save_adapter(model, f"{args.out}/adapter")

    command = ["export", f"{args.out}/adapter", "--format", "peft-lora", "--out", f"{args.out}/lora"]
    subprocess.run([sys.executable, "-m", "sparseft", *command, f"model.path={args.model}"], check=True)

    # From here on nothing needs sparseft.
    plain = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, f"{args.out}/lora")
    with torch.no_grad():
        found, expected = loaded(**batch).logits, model(**batch).logits
    difference = (found - expected).abs().max().item()
    learnt = (expected - before).abs().max().item()
    print(f"largest difference of a logit: {difference:.1e}; training has changed them by up to {learnt:.1f}")
    return {"difference": difference, "learnt": learnt}


if __name__ == "__main__":
    main()
