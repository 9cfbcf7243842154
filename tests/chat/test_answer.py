"""An answer as it comes: only sure text is said, and nothing is read twice."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sparseft
from sparseft.chat.answer import Memory, Telling, set_up, tell
from support.models import build_model, build_tokenizer


def sentencepiece_like() -> Any:
    """Words with `▁` before them, and bytes, which are no special tokens, for whatever is not in the vocabulary."""
    symbols = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh.,'"]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b"), ("c", "d")]
    symbols += ["".join(pair) for pair in merges]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=None))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


TOKENIZERS = {"bytes": build_tokenizer(), "sentencepiece": sentencepiece_like()}


def told(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], Telling]:
    """The pieces that are said when the tokens come one by one, as `generate` hands them over."""
    pieces: list[str] = []
    telling = Telling(tokenizer, stops, pieces.append)
    telling.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        telling.put(torch.tensor([token]))
        if telling.stopped:
            break
    telling.end()
    return pieces, telling


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(st.sampled_from("ab cd.,'\n\té日\N{PILE OF POO}\N{ZERO WIDTH JOINER}") | st.characters(codec="utf-8"))
)
def test_pieces_make_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces, telling = told(tokenizer, ids)
    assert "".join(pieces) == telling.text == tokenizer.decode(ids).strip()
    if "\ufffd" not in text:
        assert tokenizer.decode(ids).strip() == text.strip()
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_comes_as_soon_as_it_is_sure(name: str) -> None:
    """A word at once, a character of four bytes with its last one, white space with what follows it."""
    tokenizer = TOKENIZERS[name]
    said: list[str] = []
    telling = Telling(tokenizer, (), said.append)
    telling.put(torch.tensor([[1]]))
    after = []
    for token in tokenizer("a \N{PILE OF POO}b", add_special_tokens=False).input_ids:
        telling.put(torch.tensor([token]))
        after.append(telling.text)
    assert after[0] == "a"
    assert after[-2:] == ["a \N{PILE OF POO}", "a \N{PILE OF POO}b"]
    assert set(after) == {"a", "a \N{PILE OF POO}", "a \N{PILE OF POO}b"}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(before=st.text("ab# \n", max_size=6), behind=st.text("ab# H\n", max_size=6))
def test_an_answer_ends_where_the_model_asks_itself(name: str, before: str, behind: str) -> None:
    tokenizer, stops = TOKENIZERS[name], ("### H", "\n\nb:")
    text = f"{before}### H{behind}"
    pieces, telling = told(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, stops)
    assert telling.stopped
    assert "".join(pieces) == telling.text == text[: text.index("### H")].strip()


@given(text=st.text("ab# \n", max_size=9))
def test_what_only_looks_like_it_is_said(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    _, telling = told(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, ("### H",))
    assert telling.text == text.strip() and not telling.stopped


# -- keys and values --------------------------------------------------------------------------------------------------


class Reading:
    """How many tokens a model reads in each pass."""

    def __init__(self, model: Any) -> None:
        self.passes: list[int] = []
        model.get_input_embeddings().register_forward_hook(
            lambda module, given, out: self.passes.append(given[0].shape[1])
        )


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """transformers' greedy answer, all read anew."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=False,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def answered(model: Any, ids: list[int], memory: Memory, count: int) -> list[int]:
    telling = Telling(build_tokenizer(), (), lambda text: None)
    tell(model, ids, telling, memory, count, lambda: False)
    return telling.ids


def ready(kind: str) -> Any:
    """A tiny model that no token stops."""
    model = build_model(kind, vocab_size=300)
    model.generation_config.eos_token_id = None
    set_up(model, 0.0, None, ())
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_what_is_new_is_read(kind: str) -> None:
    model, plain, memory = ready(kind), build_model(kind, vocab_size=300), Memory()
    reading = Reading(model)
    first = [5, 6, 7, 8]
    answer = answered(model, first, memory, 5)
    assert answer == generated(plain, first, 5) and reading.passes == [4, 1, 1, 1, 1]
    reading.passes.clear()
    second = [*first, *answer, 9, 10]
    assert answered(model, second, memory, 4) == generated(plain, second, 4)
    assert reading.passes == [3, 1, 1, 1]  # the answer's last token was said, not read
    reading.passes.clear()
    other = [*first, *answer[:2], 40, 41]  # the answer is tokenised otherwise, or taken back
    assert answered(model, other, memory, 3) == generated(plain, other, 3)
    assert reading.passes == [2, 1, 1]
    reading.passes.clear()
    assert answered(model, other, memory, 3) == generated(plain, other, 3)  # the same again: its last token at least
    assert reading.passes == [1, 1, 1]
    reading.passes.clear()
    assert answered(model, [50, 51], memory, 3) == generated(plain, [50, 51], 3)
    assert reading.passes == [2, 1, 1]


def test_transformers_has_nothing_to_say(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of names that it has given up, above all: its words would stand in the middle of a talk."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, memory = ready("llama"), Memory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = answered(model, [5, 6, 7], memory, 3)
        answered(model, [*ids, 8], memory, 3)
    assert not caplog.messages


def test_layers_that_cannot_go_back_are_read_anew() -> None:
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    set_up(model, 0.0, None, ())
    memory, ids = Memory(), list(range(5, 20))
    answer = answered(model, ids, memory, 6)
    assert answer == generated(model, ids, 6)
    for more in ([*ids, *answer, 9, 10], [*ids[:12], 40, 41]):  # goes on; goes back
        assert answered(model, more, memory, 4) == generated(model, more, 4)


def test_an_interrupted_pass_leaves_nothing_wrong() -> None:
    model, memory = ready("llama"), Memory()
    ids = [5, 6, 7]
    answered(model, ids, memory, 4)

    class Stop(Telling):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.ids) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell(model, [*ids, 8], Stop(build_tokenizer(), (), lambda text: None), memory, 6, lambda: False)
    assert answered(model, [*ids, 8], memory, 4) == generated(build_model("llama", vocab_size=300), [*ids, 8], 4)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_models_own_settings_count() -> None:
    model = build_model("llama", vocab_size=300)
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 7}
    own |= {"num_beams": 3, "max_length": 50, "cache_implementation": "static", "eos_token_id": [2, 9]}
    model.generation_config = transformers.GenerationConfig(**own)
    set_up(model, None, None, {4})
    found = model.generation_config
    assert (found.do_sample, found.temperature, found.top_p, found.repetition_penalty) == (True, 0.6, 0.9, 1.3)
    assert (found.max_new_tokens, found.num_beams, found.eos_token_id) == (7, 1, [2, 4, 9])
    torch.manual_seed(3)
    one = answered(model, [5, 6], Memory(), 7)
    torch.manual_seed(3)
    assert answered(model, [5, 6], Memory(), 7) == one
    set_up(model, 0.0, 11, ())
    assert model.generation_config.max_new_tokens == 11
    plain = build_model("llama", vocab_size=300)
    expected = plain.generate(
        torch.tensor([[5, 6]]), max_new_tokens=7, do_sample=False, repetition_penalty=1.3, eos_token_id=[2, 4, 9]
    )
    assert answered(model, [5, 6], Memory(), 7) == expected[0, 2:].tolist()
    set_up(model, 1.5, None, ())
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 1.5)


def test_settings_reach_a_model_that_peft_wraps() -> None:
    model = sparseft.attach(ready("llama"), sparseft.LoraConfig(rank=2))
    set_up(model, 0.0, 6, {4})
    memory = Memory()
    answer = answered(model.eval(), [5, 6, 7], memory, 6)
    assert answer == generated(build_model("llama", vocab_size=300), [5, 6, 7], 6)  # a fresh LoRA changes nothing
    assert len(memory.ids) == 8
