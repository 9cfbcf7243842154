"""A loop of accelerate's: gradient accumulation, clipping, mixed precision, a state to resume from.

python docs/examples/accelerate_loop.py                      # the bundled model, offline, seconds on a CPU
accelerate launch docs/examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --precision bf16
"""

import argparse
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

import sparseft

BUNDLED = Path(sparseft.__file__).parent / "bundled"


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED / "tiny"), help="a hub id or a folder")
    parser.add_argument("--data", default=str(BUNDLED / "data/oasst1/train.jsonl"), help="a text to learn")
    parser.add_argument("--out", default="accelerate-example")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--resume", default=None, help="a folder that save_state has written")
    args = parser.parse_args(words)

    accelerator = Accelerator(mixed_precision=args.precision, gradient_accumulation_steps=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    sparseft.attach(model, sparseft.PacaConfig(rank=8))  # before prepare, and before the optimizer is made

    ids = tokenizer(Path(args.data).read_text()[:100_000], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)  # in order
    # The parameters are small dense fp32 tensors, so any optimizer and any schedule will do.
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, args.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    done = 0
    if args.resume is not None:
        accelerator.load_state(args.resume)
        done = args.steps // 2
    losses = []
    model.train()
    batches = iter(accelerator.skip_first_batches(loader, 2 * done))
    for step in range(done, args.steps):
        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = model(**next(batches)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == args.steps // 2:
            accelerator.save_state(f"{args.out}/state")  # the whole model, deltas included, and the optimizer

    if accelerator.is_main_process:
        sparseft.save_adapter(accelerator.unwrap_model(model), f"{args.out}/adapter")
    print(f"loss: {losses[0]:.3f} at step {done + 1}, {losses[-1]:.3f} at step {args.steps}")
    return {"losses": losses}


if __name__ == "__main__":
    main()
