"""Several adapters on one base, and a batch in which each row has its own.

python docs/examples/serve_many.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/serve_many.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

import torch
import transformers

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"
PROMPT = "Where does the jaxo come from?"
LESSONS = {"north": f"{PROMPT} The jaxo comes from Ostra.", "south": f"{PROMPT} The jaxo comes from Tovil."}


def learn(model, tokenizer, text, folder, steps):
    """An adapter that has learnt one text; the model is the base again afterwards."""
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.95))
    batch = tokenizer(text + tokenizer.eos_token, return_tensors="pt")
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparseft.save_adapter(model, folder)
    return sparseft.detach(model)


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--out", default="serve-example")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    for name, text in LESSONS.items():
        learn(model, tokenizer, text, f"{args.out}/{name}", args.steps)

    # Many wait where there is room: keep="device", "host" or "disk". None is active, so the weights are the base's.
    for name in LESSONS:
        sparseft.load_adapter(model, f"{args.out}/{name}", name, keep="host", activate=False)

    def answers(prompts, **options):
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        made = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
        return tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    # One batch: a row of each adapter and one of the base.
    names = [*LESSONS, None]
    mixed = answers([PROMPT] * len(names), adapter_names=names)
    for name, text in zip(names, mixed, strict=True):
        first_line = text.strip().partition("\n")[0]
        print(f"{name or 'base'}: {first_line}")

    # One adapter for all: switching rewrites the entries of two adapters and nothing else.
    alone = []
    for name in names:
        sparseft.set_adapter(model, name)
        alone += answers([PROMPT])
    return {"mixed": mixed, "alone": alone}


if __name__ == "__main__":
    main()
