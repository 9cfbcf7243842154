"""Masks made by what a batch says of itself are those that transformers makes by looking at it, to the bit, but for
padding that no token sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparseft.data.packing import Collator, PackedDataset
from sparseft.data.tokenized import TokenizedDataset
from sparseft.memory import AllocationCounter
from sparseft.models.masks import added, unasked
from support.syncs import Audit


def batch_of(rows: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = {"whole": [9, 9], "padded": [9, 6], "packed": [9, 4, 5]}[rows]
    ids = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
    data: Any = TokenizedDataset.from_lists([(each, [-100, *each[1:]]) for each in ids])
    return Collator(0)(list(PackedDataset(data, 9) if rows == "packed" else data))


def sliding() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4,
        )
    )  # fmt: skip


def trained(model: Any, batch: dict[str, Any], told: bool) -> tuple[list[torch.Tensor], list[str]]:
    audit = Audit()
    model.zero_grad()
    audit.start()
    if told:
        with unasked(batch):
            loss = model(**batch, use_cache=False).loss
    else:
        loss = model(**batch, use_cache=False).loss
    audit.stop()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], audit.found


@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "sliding"])
def test_losses_and_gradients_are_the_same_bits(kind: str, rows: str, make_model: Any) -> None:
    model = sliding() if kind == "sliding" else make_model(kind)
    batch = batch_of(rows)
    names = {"whole": set(), "padded": {"attention_mask"}, "packed": {"position_ids"}}
    assert batch.keys() == {"input_ids", "labels"} | names[rows]
    asking = batch | ({"attention_mask": torch.ones_like(batch["input_ids"])} if rows == "whole" else {})
    expected, waits = trained(model, asking, told=False)
    found, none = trained(model, batch, told=True)
    assert len(expected) == len(found) > 1
    for a, b in zip(expected, found, strict=True):
        if rows == "padded":
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6 * float(a.abs().max()))
        else:
            assert torch.equal(a, b)
    assert none == []
    assert waits or (kind == "sliding" and rows != "packed")  # its window needs a mask in any case


def own_terms() -> Any:
    """Experts whose router adds to the loss, by the tokens that are none of the padding."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0,
        )
    )  # fmt: skip


def seen_ahead() -> Any:
    """A model in which earlier tokens see later ones."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3TextConfig(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 2, use_bidirectional_attention=True,
        )
    )  # fmt: skip


def never_causal() -> Any:
    """A model whose attention is not causal without a mask."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.GemmaConfig(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True,
        )
    )  # fmt: skip


def recurrent() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.BambaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8,
            attn_layer_indices=[1],
        )
    )  # fmt: skip


@pytest.mark.parametrize("version", ["installed", "5.17"])
@pytest.mark.parametrize(
    ("made", "masked"),
    [(None, "never"), (own_terms, "never"), (recurrent, "never"), (sliding, "once"), (seen_ahead, "each"),
     (never_causal, "each")],
)  # fmt: skip
def test_padding_that_no_token_sees_needs_no_mask(
    made: Any, masked: str, version: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window's is one for all rows. Rows without labels may be padded on the left. transformers 5.17 skips no mask
    while it must not look, even where there is no padding to look at."""
    model, batch, seen = make_model("llama") if made is None else made(), batch_of("padded"), []

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    expected, _ = trained(model, batch, told=False)
    monkeypatch.setattr(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "_local_mapping", {"sdpa": attention})
    if version == "5.17":
        newer = masking_utils._ignore_causal_mask_sdpa

        def ignored(padding: Any, *shape: Any) -> bool:
            return not masking_utils.is_tracing(padding) and newer(padding, *shape)

        monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", ignored)
    found, _ = trained(model, batch, told=True)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6 * float(a.abs().max()))
    assert seen and all((mask is None) == (masked == "never") for mask in seen)
    if masked != "never":
        assert all((mask.stride(0) == 0) == (masked == "once") for mask in seen)
    seen.clear()
    with torch.no_grad(), unasked(prompts := {name: batch[name] for name in ("input_ids", "attention_mask")}):
        model(**prompts, use_cache=False)
    assert seen and not any(mask is None for mask in seen)


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_a_mask_is_kept_once(rows: str) -> None:
    """In the dtype of what it is added to, and not by each layer, as torch makes it of a boolean one."""
    taken = {}
    for layers in (1, 3):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                                     num_hidden_layers=layers),
            dtype=torch.bfloat16,
        )  # fmt: skip
        ids = torch.ones(1, 250, dtype=torch.long)  # no multiple of 16
        places = torch.arange(250)[None]
        laid = {"attention_mask": (places < 240).long()} if rows == "padded" else {"position_ids": places % 125}
        with unasked(laid), AllocationCounter() as counter:
            loss = model(input_ids=ids, labels=ids, use_cache=False, **laid).loss
        taken[layers] = counter.live
        del loss
    assert taken[1] > 250 * 256 * 2  # its rows begin where torch's kernel for GPUs takes them as they are
    assert taken[3] - taken[1] < 2 * 250 * 250 * 2


class OthersConfig(transformers.LlamaConfig):
    """Of a model whose code is not transformers' own."""


def test_queries_of_another_dtype_than_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        output, weights = sdpa_attention_forward(module, q.float(), k.float(), v.float(), mask, **options)
        return output.bfloat16(), weights

    monkeypatch.setattr(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "_local_mapping", {"sdpa": attention})
    sizes = {"vocab_size": 96, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(OthersConfig(**sizes, num_hidden_layers=1)).bfloat16()
    batch = batch_of("padded")
    with unasked(batch):
        assert model(**batch, use_cache=False).loss.isfinite()


def test_a_mask_that_is_somebodys_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    for own in ({"other": max}, {"sdpa": max}):
        monkeypatch.setattr(masks, "_local_mapping", own)
        with unasked([]):
            assert {name: masks[name] for name in own} == own
            assert masks["sdpa"] is own.get("sdpa", added)
        assert masks._local_mapping is own
