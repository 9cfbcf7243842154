"""`trainer.checkpointing=selective`: the plain step's loss and gradients, and less that is kept for them."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.bench.timing import held_bytes
from sparseft.config import HardwareConfig, TrainerConfig, checkpointing_of
from sparseft.layers import sparse_layers
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.memory import AllocationCounter
from sparseft.methods import get_method
from sparseft.models import labelled_loss
from sparseft.selection.selection import Selection
from sparseft.training.arguments import training_arguments
from sparseft.training.recomputing import CHEAP, UP, describe, recomputing
from sparseft.training.reselection.swap import apply_selection
from sparseft.training.trainer import train
from support.products import Products
from support.running import METHODS, files, on, refused, sparseft, summary, write_data
from support.training import CPU, examples, trainer_of

ALL = (*CHEAP, UP)
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, **COMMON),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, **COMMON, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, **COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=96, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=64, ffn_dim=256, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64, vocab_size=96,
        dropout=0.0,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, **COMMON, num_local_experts=4),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "s2ft": {"sparsity": 0.9, "roles": ["down"], "importance": "weight"},
    "sylva": {"sparsity": 0.9, "block_size": 16, "importance": "weight"},
    "lora": {"rank": 2, "dropout": 0.0},
    "full": {"dtype": "model"},
}
SETTINGS["s2ft rows"] = SETTINGS["s2ft"] | {"roles": ["q", "o", "up", "down"]}


def made(kind: str, method: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype, attn_implementation=attention)
    settings = SETTINGS[method]
    if kind == "mixtral" and method.startswith(("s2ft", "sylva")):
        settings = settings | {"importance": "random"}
    return attach(model, get_method(method.split()[0])(**settings)).train()


def batch(length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(model: Any, kinds: tuple[str, ...] = ()) -> torch.Tensor:
    if not kinds:
        return model(**batch(), use_cache=False).loss
    share_inputs_in_training(model)
    with recomputing(model, kinds):
        return model(**batch(), use_cache=False).loss


def gradients(model: Any, kinds: tuple[str, ...] = ()) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_of(model, kinds)
    loss.backward()
    found = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradients_are_the_plain_ones(kind: str, method: str, dtype: torch.dtype) -> None:
    """To the bit: the very operations, on the very numbers. A LayerNorm is made again by another formula, and slices
    of blocks may be summed in another order than the whole input."""
    model = made(kind, method, dtype)
    loss, expected = gradients(model)
    again, found = gradients(model, ALL)
    assert torch.equal(loss, again)
    assert expected and found.keys() == expected.keys()
    exact = kind != "gpt2" and method != "sylva"
    for name, gradient in expected.items():
        if exact:
            assert torch.equal(found[name], gradient), name
        else:
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * gradient.abs().max()
            assert (found[name] - gradient).abs().max() <= tolerance, name


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "opt", "mixtral"])
def test_other_architectures(kind: str) -> None:
    model = made(kind, "s2ft rows")
    loss, expected = gradients(model)
    again, found = gradients(model, ALL)
    assert torch.equal(loss, again) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SETTINGS)
def test_less_is_kept(method: str, dtype: torch.dtype) -> None:
    model = made("llama", method, dtype)
    plain, selective, up = (held_bytes(lambda kinds=kinds: loss_of(model, kinds), CPU) for kinds in ((), CHEAP, ALL))
    assert selective < {torch.float32: 0.9, torch.bfloat16: 0.8}[dtype] * plain
    assert up < selective or method in ("full", "lora")  # whose up projection is no product of a frozen weight


def test_what_is_kept_is_what_the_docs_count() -> None:
    """Of a frozen layer in bf16 above the lowest trained one, in numbers of 2 bytes a token: two norms' inputs, q (and
    k and v, each repeated for its group or not), attention's result, gate and up."""
    model = made("llama", "s2ft", torch.bfloat16)
    share_inputs_in_training(model)
    with recomputing(model) as hooks:
        loss = model(**batch(), use_cache=False).loss
    tokens, width, wide = 48, 64, 176
    # three layers; the lowest trains its down projection, below which nothing is kept
    assert hooks.taken["activations"] == 2 * tokens * wide * 2
    # fp32 copies of the norms' inputs, with their originals kept: 2 a layer above the lowest, and the last norm
    assert hooks.taken["copies"] == (2 * 2 + 1) * tokens * width * 2
    assert "MiB" in str(describe(hooks.taken))
    assert describe(Counter()) is None
    del loss


def test_no_product_runs_twice_but_those_of_up() -> None:
    model = made("llama", "s2ft")
    counts = []
    for kinds in ((), CHEAP, ALL):
        loss = loss_of(model, kinds)
        with Products() as products:
            loss.backward()
        counts.append(sum(products.found.values()))
    # Of three layers the lowest needs no input of its MLP, and the last keeps its up projection.
    assert counts == [counts[0], counts[0], counts[0] + 1]


def test_an_up_projection_that_trains_is_made_again_too() -> None:
    model = made("llama", "sylva")
    ups = [name for name, layer in sparse_layers(model).items() if name.endswith("up_proj") and layer.patterns]
    assert len(ups) == 3
    counts = []
    for kinds in (CHEAP, ALL):
        loss = loss_of(model, kinds)
        with Products() as products:
            loss.backward()
        counts.append(sum(products.found.values()))
    assert counts == [counts[0], counts[0] + 2]  # of all layers but the last


def test_eager_attention_keeps_one_copy_of_its_softmax() -> None:
    model = made("llama", "s2ft", torch.bfloat16, "eager")
    loss, expected = gradients(model)
    again, found = gradients(model, CHEAP)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with recomputing(model) as hooks:
        model(**batch(), use_cache=False)
    scores = 2 * 4 * 24 * 24 * 2  # samples, heads, tokens, tokens, bytes
    assert hooks.taken["copies"] >= 2 * scores


def test_accumulated_and_repeated_passes() -> None:
    model = made("llama", "sylva")
    _, expected = gradients(model)
    loss = loss_of(model, ALL)
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(model, ALL).backward()
    for name, p in trainable_parameters(model).items():
        torch.testing.assert_close(p.grad, 3 * expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_graph_is_gone_with_its_loss(attention: str) -> None:
    """Recipes hold what comes before them, and operations that save their own result not themselves: never a circle,
    which no collector would find."""
    model = made("llama", "sylva", torch.bfloat16, attention)
    gradients(model, ALL)  # layers settle what they save, and keep indices for it

    def left(backward: bool) -> int:
        with AllocationCounter() as counter:
            with recomputing(model, ALL):
                loss = model(**batch(), use_cache=False).loss
            if backward:
                loss.backward()
                model.zero_grad()
            del loss
            return counter.live

    gc.collect()
    gc.disable()
    try:
        left(True)  # layers cache indices
        assert left(False) == left(True) == 0
    finally:
        gc.enable()


def test_what_was_written_to_in_the_meantime_is_refused() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
    with recomputing(made("llama", "s2ft")):
        gate, up = x @ w, x * 3.0
        y = F.silu(gate) * up
    gate.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")])
def test_a_gate_by_itself(activation: Any) -> None:
    """Against autograd's own, with everything trained: operands that are leaves, views and constants."""
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def run() -> torch.Tensor:
        gate, up = (F.layer_norm(x * 1.0, (8,), w)).chunk(2, -1)
        return ((0.5 * activation(gate.contiguous()) * up).view(-1, 2).to(torch.float32) ** 2).sum()

    expected = torch.autograd.grad(run(), (x, w))
    with recomputing(made("llama", "s2ft")):
        loss = run()
    for found, value in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


@pytest.fixture
def fused_rms_norm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`F.rms_norm` as an accelerator runs it, one operation with a node of its own, by kernels written here."""

    def forward(x: torch.Tensor, shape: Any, weight: torch.Tensor | None, eps: float) -> Any:
        inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        made = x.float() * inverse
        return (made if weight is None else made * weight).to(x.dtype), inverse

    def backward(gradient: Any, x: Any, shape: Any, inverse: Any, weight: Any, mask: Any) -> Any:
        g = gradient.float() * (1 if weight is None else weight)
        of_x = inverse * (g - x.float() * inverse.square() * (g * x.float()).mean(-1, keepdim=True))
        return of_x.to(x.dtype), None

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", forward, "CPU")
        library.impl("_fused_rms_norm_backward", backward, "CPU")
        monkeypatch.setattr(F, "rms_norm", lambda *words: torch.ops.aten._fused_rms_norm(*words)[0])
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_an_rms_norm_of_torch(fused: bool, affine: bool, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if fused:
        request.getfixturevalue("fused_rms_norm")
    torch.manual_seed(0)
    norm = nn.RMSNorm(32, eps=1e-6, elementwise_affine=affine).to(dtype).requires_grad_(False)
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    into, out = torch.randn(16, 32, dtype=dtype), torch.randn(32, 4, dtype=dtype, requires_grad=True)
    if affine:
        torch.nn.init.normal_(norm.weight)

    def step(kinds: tuple[str, ...]) -> tuple[list[torch.Tensor], Counter[str]]:
        with recomputing(norm, kinds) if kinds else contextlib.nullcontext() as hooks:
            normal = norm(x @ into)
            loss = (normal @ out).square().sum()
        assert ("FusedRms" in normal.grad_fn.name()) == fused
        del normal
        return [loss.detach(), *torch.autograd.grad(loss, (x, out))], hooks.taken if kinds else Counter()

    expected, _ = step(())
    found, taken = step(CHEAP)
    assert taken["products"] + taken["copies"] >= 8 * 32 * dtype.itemsize  # at least what the product after it needs
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_capped_logits_are_gone_with_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's cap saves its result, which the loss is done with before the forward pass has ended."""
    monkeypatch.setattr(labelled_loss, "tokens_at_once", lambda *_: 4)
    config = transformers.Gemma2Config(**SHAPE, **COMMON | {"vocab_size": 20_000}, head_dim=16)
    model = attach(transformers.Gemma2ForCausalLM(config), get_method("s2ft")(**SETTINGS["s2ft"])).train()
    peaks = []
    for way in (contextlib.nullcontext(), recomputing(model)):
        with AllocationCounter() as counter, labelled_loss.labelled_loss(model), way:
            model(**batch(), use_cache=False)
        peaks.append(counter.peak)
    assert peaks[1] <= peaks[0]


def test_a_copy_on_another_device_is_made_again_there() -> None:
    """As between the devices of a model that is spread over several; `meta` stands for the second one."""
    x = torch.randn(3, 4, requires_grad=True)
    with recomputing(made("llama", "s2ft")):
        copy = (x * 3.0).to("meta")
        narrow = (x + 1.0).to(torch.bfloat16)
        wide = narrow.to("meta", torch.float32)
        products = (copy * copy).grad_fn, (wide * wide).grad_fn, (narrow * narrow).grad_fn
        assert [node._saved_self.device.type for node in products] == ["meta", "meta", "cpu"]


# ---- runs ----


@pytest.mark.parametrize("way", ["selective", "selective_up"])
def test_a_run_ends_as_a_plain_one(tmp_path: Path, model_folder: Any, way: str) -> None:
    data = write_data(tmp_path)["json"]
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=3"]
    done = sparseft(tmp_path, *words, f"trainer.checkpointing={way}", "output_dir=less")
    assert "computed again, not kept" in done.err
    sparseft(tmp_path, *words, "output_dir=plain")
    assert files(tmp_path / "less" / "adapter") == files(tmp_path / "plain" / "adapter")
    assert summary(tmp_path / "less")["train_loss"] == summary(tmp_path / "plain")["train_loss"]


def test_layers_save_slices_again_after_training(tmp_path: Path) -> None:
    model = made("llama", "sylva")
    settings = {name: layer.keeps_input for name, layer in sparse_layers(model).items()}
    trainer = trainer_of(model, tmp_path, examples(4), max_steps=1)
    trainer.recomputed = CHEAP
    share_inputs_in_training(model)
    train(trainer, None, 1)
    loss_of(model).backward()
    assert {name: layer.keeps_input for name, layer in sparse_layers(model).items()} == settings


def test_a_reselection_keeps_no_more() -> None:
    """q, k and v go on reading what is made again for them, and save no slices beside it."""
    model = made("llama", "sylva")
    share_inputs_in_training(model)

    def kept() -> tuple[int, dict[str, bool | None]]:
        def loss() -> torch.Tensor:
            with recomputing(model):
                return model(**batch(), use_cache=False).loss

        loss()  # settles what is saved
        return held_bytes(loss, CPU), {name: layer.keeps_input for name, layer in sparse_layers(model).items()}

    before = kept()
    layers = {name: layer for name, layer in sparse_layers(model).items() if layer.patterns}
    again = {name: {"blocks": layer.blocks.index.cpu()} for name, layer in layers.items()}
    apply_selection(model, Selection(again, block_size=16))
    assert kept() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.checkpointing=selective", "trainer.compile=layers"], "compiled code decides by itself"),
        (["trainer.checkpointing=selective_up", "hardware.zero_stage=3"], "with hardware.zero_stage=3 use"),
        (["trainer.checkpointing=some"], "trainer.checkpointing"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused(tmp_path, "train", *words)


@pytest.mark.parametrize(
    ("setting", "hardware", "expected"),
    [("auto", False, "none"), ("auto", True, "full"), ("none", True, "none"), ("full", False, "full"),
     ("selective", True, "selective")],
)  # fmt: skip
def test_the_hardware_decides_where_the_trainer_does_not(setting: str, hardware: bool, expected: str) -> None:
    trainer = TrainerConfig(checkpointing=setting, max_steps=1, learning_rate=1e-3, warmup_steps=0)
    machine = HardwareConfig(gradient_checkpointing=hardware)
    assert checkpointing_of(trainer, machine) == expected
    made = training_arguments(trainer, machine, seed=0, device=CPU, total_steps=1)
    asked = getattr(made, "activation_checkpointing", getattr(made, "gradient_checkpointing", None))
    assert bool(asked) == (expected == "full")
