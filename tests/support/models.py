"""Tiny random models and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("llama", "qwen2", "gpt2")


VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, CONTEXT = 96, 48, 80, 2, 128


def tiny_config(kind: str, vocab_size: int = VOCABULARY) -> Any:
    """The Hugging Face config of a tiny model.

    `llama`: grouped queries (6 query heads, 2 key/value heads) and an explicit head_dim of 12, where hidden / heads
    is 8, so that code which guesses either one breaks. `qwen2`: biases on q, k, v. `gpt2`: Conv1D layers, whose
    weights are stored (in, out), a fused qkv projection, and embeddings tied to the head.
    """
    import transformers

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            **special,
        )
    if kind == "qwen2":
        return transformers.Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            **special,
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=HIDDEN,
            n_inner=INTERMEDIATE,
            n_layer=LAYERS,
            n_head=4,
            n_positions=CONTEXT,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    raise ValueError(f"no tiny model '{kind}'; there are {', '.join(KINDS)}")


def build_model(kind: str, dtype: Any = None, seed: int = 0, vocab_size: int = VOCABULARY) -> Any:
    """A tiny random causal LM of `kind` in eval mode; `dtype` a torch dtype (float32 when None).

    Biases and norm weights are random too: with the zeros and ones of a fresh model, code that drops or misplaces
    one would still agree.
    """
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
                else:
                    parameter.normal_(0.0, 0.2)  # larger than usual: differences show in the logits
    return model.to(dtype or torch.float32).eval()


def build_tokenizer() -> Any:
    """A small byte-level BPE tokenizer (any text round-trips): `<pad>` 0, `<s>` 1, `</s>` 2; adds no BOS by itself.

    The merges are spelt out, not trained: the trainer breaks ties by hash order, so its ids differ between runs.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in "Ġ### ĠHuman ĠAssistant Ġthe Ġanswer Ġis Ġtrue Ġfalse Instruction Response".split():
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                symbols.append(word[: end + 1])
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=CONTEXT
    )


def wide_base(folder: Path) -> Path:
    """A model folder in bf16 whose rows are whole groups of 64, as NF4 packs them."""
    import torch
    import transformers

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
