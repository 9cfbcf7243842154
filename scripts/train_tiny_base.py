"""Trains the bundled tiny model from scratch and writes it with its data to `sparseft/bundled/`.

    python scripts/train_tiny_base.py                 # the bundled folder again, minutes on 2 CPU cores
    python scripts/train_tiny_base.py --data-only     # the data sets only, seconds
    python scripts/train_tiny_base.py --steps 50 --out /tmp/trial

Recipe: a byte-level BPE tokenizer trained on the same text; documents packed into rows of 256 tokens; Muon for the
layers' matrices and AdamW for the rest, on float32 weights with products of matrices in bfloat16; the loss of tokens
that the facts, the arithmetic or the context determine weighted more than that of the others; the weights saved in
bfloat16. `docs/tiny-model.md` has the measured result.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_data  # noqa: E402
import tiny_skills  # noqa: E402
import torch  # noqa: E402
from tiny_text import Document, documents  # noqa: E402
from tiny_world import World, make_world  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1536
TOKENIZER_DOCUMENTS = 12_000
LENGTH = 256  # tokens a row
BATCH = 8  # rows a step
MUON_PEAK = 0.02  # highest learning rate of the decoder layers' matrices
ADAMW_PEAK = 3e-3  # and of the embedding and the norms
ANSWER_WEIGHT = 10.0  # of a token inside an answer span, against 1
MICRO_DOCUMENTS = 512  # tokenised at once


def train_tokenizer(world: World, seed: int):
    """Byte-level BPE (any text comes back), digits one by one, nothing added by `encode`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    base = (d.text for d in itertools.islice(documents(world, seed), TOKENIZER_DOCUMENTS))
    tokenizer.train_from_iterator(itertools.chain(base, tiny_data.prompt_texts(world)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="right",
    )


def new_model(vocabulary: int, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.06,
        )
    )


def float32_attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
    """Attention outside autocast: its backward pass in bfloat16 is slower than in float32 on a CPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)


def weights_of(document: Document, offsets: list[tuple[int, int]]) -> list[float]:
    """One loss weight a token; `offsets` are the tokens' character spans."""
    known = [False] * len(document.text)
    for start, end in document.answers:
        known[start:end] = [True] * (end - start)
    return [ANSWER_WEIGHT if any(known[start:end]) else 1.0 for start, end in offsets]


def rows(world: World, seed: int, tokenizer) -> Iterator[tuple[list[int], list[float]]]:
    """Packed rows of LENGTH + 1 tokens and their loss weights; every second document starts with BOS, each ends
    with EOS. What follows EOS cannot be known and weighs nothing."""
    stream = documents(world, seed)
    ids: list[int] = []
    weights: list[float] = []
    for number in itertools.count():
        batch = list(itertools.islice(stream, MICRO_DOCUMENTS))
        encoded = tokenizer([d.text for d in batch], return_offsets_mapping=True, add_special_tokens=False)
        for place, document in enumerate(batch):
            if (number * MICRO_DOCUMENTS + place) % 2 == 0:
                ids.append(tokenizer.bos_token_id)
                weights.append(0.0)
            ids += encoded["input_ids"][place] + [tokenizer.eos_token_id]
            weights += [*weights_of(document, encoded["offset_mapping"][place]), 1.0]
        while len(ids) > LENGTH:
            yield ids[: LENGTH + 1], weights[: LENGTH + 1]
            del ids[:LENGTH], weights[:LENGTH]


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy: logits (b, s, v), targets and weights (b, s)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train(model, world: World, tokenizer, *, steps: int, seed: int, every: int) -> float:
    """Trains in place; returns the seconds it took."""
    from transformers import AttentionInterface

    products = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(products, lr=MUON_PEAK, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_PEAK, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))),
        )
        for optimizer in optimizers
    ]
    source = rows(world, seed, tokenizer)
    AttentionInterface.register("float32_attention", float32_attention)
    model.set_attn_implementation("float32_attention")
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = list(itertools.islice(source, BATCH))
        ids = torch.tensor([row for row, _ in batch])
        weights = torch.tensor([row for _, row in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = loss_of(logits, ids[:, 1:], weights[:, 1:])
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % every == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(
                f"step {step:5d}/{steps}  loss {loss.item():.3f}  "
                f"{step * BATCH * LENGTH / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            if step % (every * 5) == 0 and step < steps:
                print("   ", tiny_skills.line(tiny_skills.measure(model, tokenizer, world, limit=60)), flush=True)
                model.train()
    model.set_attn_implementation("sdpa")
    return time.perf_counter() - start


def save(model, tokenizer, folder: Path) -> None:
    """Writes the model folder aside and renames it."""
    from transformers import GenerationConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tiny-"))
    aside.chmod(0o755)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        path.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the text and the weights")
    parser.add_argument("--out", type=Path, default=ROOT / "sparseft" / "bundled", help="folder for tiny/ and data/")
    parser.add_argument("--data-only", action="store_true", help="write data/ and train nothing")
    parser.add_argument("--every", type=int, default=100, help="steps between two printed lines")
    args = parser.parse_args()
    world = make_world(args.seed)
    tiny_data.write(world, args.out / "data")
    if args.data_only:
        return
    tokenizer = train_tokenizer(world, args.seed)
    model = new_model(len(tokenizer), args.seed)
    total = sum(p.numel() for p in model.parameters())
    print(f"{len(tokenizer)} tokens in the vocabulary, {total:,} parameters, {torch.get_num_threads()} threads")
    seconds = train(model, world, tokenizer, steps=args.steps, seed=args.seed, every=args.every)
    save(model, tokenizer, args.out / "tiny")
    print(f"{args.steps} steps, {args.steps * BATCH * LENGTH:,} tokens, {seconds:.0f} s; held-out skill in bfloat16:")
    for name, (accuracy, chance, count) in tiny_skills.measure(model, tokenizer, world).items():
        print(f"  {name:28s} {accuracy:6.1%}  (chance {chance:.1%}, {count} questions)")


if __name__ == "__main__":
    main()
