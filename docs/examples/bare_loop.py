"""Nothing but PyTorch: attach, train, save, merge, and the base back bit for bit.

python docs/examples/bare_loop.py                         # the bundled model, offline, seconds on a CPU
python docs/examples/bare_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

import torch
import transformers

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--data", default=str(BUNDLED / "data/oasst1/train.jsonl"), help="a text to learn")
    parser.add_argument("--out", default="bare-example")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    base = {name: weight.clone() for name, weight in model.state_dict().items()}  # only to show what changes
    ids = tokenizer(Path(args.data).read_text()[:100_000], return_tensors="pt").input_ids[0]
    batches = [{"input_ids": rows, "labels": rows} for rows in ids[: len(ids) // 512 * 512].view(-1, 4, 128)]

    config = sparseft.SylvaConfig(sparsity=0.95, block_size=16, num_samples=16)
    selection = sparseft.compute_selection(model, config, batches[:4])  # which blocks: scored on four batches
    sparseft.attach(model, config, selection)

    # torch.optim.AdamW does as well; this one also writes the weights in the same pass, which is faster on a GPU.
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=5e-3, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(args.steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()

    sparseft.save_adapter(model, f"{args.out}/adapter")
    trained = sum(parameter.numel() for parameter in sparseft.trainable_parameters(model).values())
    sparseft.set_adapter(model, None)  # the base, bit for bit, the adapter kept in memory
    same = all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items() if name in base)
    sparseft.set_adapter(model, "default")
    merged = sparseft.merge(model)  # plain weights with what was learnt; sparseft.detach gives the base instead
    changed = sum(int((weight != base[name]).sum()) for name, weight in merged.state_dict().items())
    merged.save_pretrained(f"{args.out}/merged")
    print(f"loss: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {args.steps}")
    print(f"{trained:,} weights train, {changed:,} have changed; without the adapter it is the base: {same}")
    return {"losses": losses, "trained": trained, "changed": changed, "same": same, "selection": selection}


if __name__ == "__main__":
    main()
