"""Trying a model for whether it is causal: real ones pass as they were, encoders and half-blind ones are refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models import probing
from sparseft.models.decoder import context_length
from sparseft.models.loading import load_config, type_written
from sparseft.models.probing import check_causal
from support.running import files, on, refused, write_data

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}

CAUSAL: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**DECODER, attention_dropout=0.5),
    "mistral, window": transformers.MistralConfig(**DECODER, sliding_window=3),
    "gemma2": transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=4),
    "gpt2, dropout": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon, ALiBi": transformers.FalconConfig(**SIZES, alibi=True),
    "mpt": transformers.MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4),
    "mixtral": transformers.MixtralConfig(**DECODER, num_local_experts=4),
    "qwen3 moe": transformers.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mamba": transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": transformers.Mamba2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1,
        chunk_size=4,
    ),
    "recurrent gemma": transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, intermediate_size=48, lru_width=32, attention_window_size=4
    ),
    "bert as a decoder": transformers.BertConfig(**ENCODER, is_decoder=True),
    "xlm, causal": transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, causal=True),
}  # fmt: skip
SEEING: dict[str, Any] = {
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**ENCODER),
    "camembert": transformers.CamembertConfig(**ENCODER),
    "xlnet": transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "electra": transformers.ElectraConfig(**ENCODER, embedding_size=32),
    "big bird": transformers.BigBirdConfig(**ENCODER),
    "roformer": transformers.RoFormerConfig(**ENCODER),
    "xlm": transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4),
    "ernie": transformers.ErnieConfig(**ENCODER),
    "data2vec": transformers.Data2VecTextConfig(**ENCODER),
    "bert generation": transformers.BertGenerationConfig(**ENCODER),
    "megatron bert": transformers.MegatronBertConfig(**ENCODER),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass_and_are_left_alone(name: str, dtype: torch.dtype) -> None:
    model = build(CAUSAL[name], dtype).train()
    next(model.children()).eval()  # a part that somebody has set apart
    modes = [module.training for module in model.modules()]
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    check_causal(model, "model.path=x")
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEEING)
def test_models_that_see_later_tokens_are_refused(name: str, dtype: torch.dtype) -> None:
    model = build(SEEING[name], dtype)
    if name == "xlnet" and dtype != torch.float32:
        pytest.skip("XLNet does not run in half precision")
    with pytest.raises(UserError, match=f"^model.path=x: {type(model).__name__} is not causal: "):
        check_causal(model, "model.path=x")


class Toy(nn.Module):
    """Embeddings, what `mix(hidden)` makes of them (rows, length, hidden), and a head."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.head, self.mix = nn.Embedding(50, 8), nn.Linear(8, 50), mix
        self.config = transformers.LlamaConfig(vocab_size=50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor) -> Any:  # knows no mask and no cache
        return types.SimpleNamespace(logits=self.head(self.mix(self.embeddings(input_ids))))


class Opaque(Toy):
    """One that does not say where its embeddings are."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def within_blocks(size: int) -> Callable[[Tensor], Tensor]:
    """Every position sees its whole block of `size` and all blocks before."""

    def mix(hidden: Tensor) -> Tensor:
        ends = (torch.arange(hidden.shape[1]) // size + 1) * size - 1
        return hidden.cumsum(1)[:, ends.clamp(max=hidden.shape[1] - 1)]

    return mix


@pytest.mark.parametrize("kind", [Toy, Opaque])
@pytest.mark.parametrize("size", range(2, 9))
def test_no_border_hides_a_view(size: int, kind: type[Toy]) -> None:
    check_causal(kind(within_blocks(1)), "x")
    with pytest.raises(UserError, match="is not causal"):
        check_causal(kind(within_blocks(size)), "x")


def test_one_of_the_two_witnesses_is_not_enough() -> None:
    def rounding(hidden: Tensor) -> Tensor:  # a gradient, as of a kernel that is not exact, and no change
        total = hidden.sum(1, keepdim=True)
        return hidden + 1e-6 * (total - total.detach())

    def crowding_out(hidden: Tensor) -> Tensor:  # a choice among all tokens, as of experts that are full
        return hidden + (hidden.detach().sum((1, 2)) > 0)[:, None, None]

    check_causal(Toy(rounding), "x")
    check_causal(Toy(crowding_out), "x")


def test_embeddings_that_are_changed_in_place_or_turned() -> None:
    def turned(hidden: Tensor) -> Tensor:
        hidden *= 2
        return hidden.transpose(0, 1).cumsum(0).transpose(0, 1)

    check_causal(Toy(turned), "x")


def at_least(length: int) -> Callable[[Tensor], Tensor]:
    def mix(hidden: Tensor) -> Tensor:
        if hidden.shape[1] < length:
            raise ValueError(f"needs {length} tokens\nand more words")
        return hidden.cumsum(1)

    return mix


def test_a_model_that_needs_many_tokens_gets_them_and_one_that_cannot_run_is_told() -> None:
    check_causal(Toy(at_least(100)), "x")
    message = "^x: Toy cannot be run on 128 tokens, .*: ValueError: needs 1000 tokens$"
    with pytest.raises(UserError, match=message):
        check_causal(Toy(at_least(1000)), "x")


def test_no_numbers_are_neither_causal_nor_not() -> None:
    for config in (CAUSAL["llama"], SEEING["bert"]):
        model = build(config)
        with torch.no_grad():
            list(model.parameters())[3].fill_(float("nan"))
        with pytest.raises(UserError, match="x: the logits of .* are no number"):
            check_causal(model, "x")
    infinite = Toy(lambda hidden: hidden.cumsum(1))
    with torch.no_grad():
        infinite.head.bias[3] = -torch.inf  # a token that is never predicted
    check_causal(infinite, "x")


def test_tokens_with_a_meaning_of_their_own_are_not_drawn() -> None:
    model = Toy(lambda hidden: hidden)
    model.config = transformers.LlamaConfig(vocab_size=50, pad_token_id=0, eos_token_id=[2, 3], image_token_id=4)
    ids = probing.plain_tokens(model, 40, 40)
    assert set(ids.flatten().tolist()) == {*range(50)} - {0, 1, 2, 3, 4}  # BOS is 1
    assert (probing.plain_tokens(model, 40, 40, shift=1) != ids).all()


def test_contexts_without_a_bound() -> None:
    assert context_length(SEEING["xlnet"]) is None  # which says -1
    assert context_length(CAUSAL["llama"]) == context_length(SEEING["bert"]) == 64
    config = transformers.LlamaConfig(**DECODER)
    for value, expected in ((0, None), (-1, None), (1e30, None), (int(1e30), None), (None, None), (4096, 4096)):
        config.__dict__["max_position_embeddings"] = value
        assert context_length(config) == expected


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_every_command_refuses_an_encoder(kind: str, tmp_path: Path, tokenizer: Any, in_tmp: Path) -> None:
    config = type(SEEING[kind]).from_dict(SEEING[kind].to_dict() | {"vocab_size": len(tokenizer)})
    build(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = on(tmp_path / "model", write_data(tmp_path)["json"])
    there = files(tmp_path)
    evaluated = ("--base", "hardware=cpu", f"model.path={tmp_path / 'model'}")
    for command in (
        ("train", *words, "method=lora", "output_dir=run"),
        ("train", *words, "method=full", "output_dir=run"),
        ("preprocess", *words, "method=s2ft"),
        ("eval", "boolq", *evaluated, f"eval.data_dir={Path(probing.__file__).parents[1] / 'bundled' / 'data'}"),
        ("bench", "train", *words, "bench.methods=[full]"),
    ):
        message = refused(tmp_path, *command)
        assert "is not causal: its predictions depend on later tokens" in message, message
        left = {name for name in files(tmp_path) - there if not name.startswith(".cache/")}
        assert not left, left


@pytest.mark.parametrize("kind", [transformers.T5Config, transformers.ViTConfig])
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_a_model_of_another_kind_is_refused_in_a_sentence(kind: Any, plan: list[str], in_tmp: Path) -> None:
    kind().save_pretrained(in_tmp / "model")  # no weights: none are looked for
    message = refused(in_tmp, "train", *plan, *on(in_tmp / "model", write_data(in_tmp)["json"]))
    assert f"no causal language model of the type '{kind.model_type}'" in message


@pytest.mark.parametrize("kind", [transformers.MllamaConfig, transformers.Llama4Config, transformers.LlamaConfig])
def test_a_model_that_could_not_be_loaded_again_is_not_trained_whole(kind: Any, in_tmp: Path) -> None:
    """Of the first two the text part alone is loaded; saved by itself only the second one loads again."""
    written = "mllama_text_model" if kind is transformers.MllamaConfig else None
    kind().save_pretrained(in_tmp / "model")
    assert type_written(load_config(ModelConfig(path=str(in_tmp / "model")))) == written
    if written is not None:
        message = refused(in_tmp, "train", "method=full", *on(in_tmp / "model", write_data(in_tmp)["json"]))
        assert f"would be saved as a model of the type '{written}', which transformers does not load" in message
