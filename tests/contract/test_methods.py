"""What holds for every method on every architecture, in fp32 and bf16, from attaching to leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sparseft
from sparseft.errors import UserError
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.methods import METHODS, get_method
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection

KINDS = ("llama", "qwen2", "gpt2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL_RATIOS = {f"{role}_ratio": 0.3 for role in "qkvogud"}

SPARSE: dict[str, Any] = {
    "s2ft": sparseft.S2FTConfig(),
    "s2ft_o_d": sparseft.S2FTConfig(o_ratio=0.4, d_ratio=0.05, allocation="global"),
    "s2ft_all": sparseft.S2FTConfig(**ALL_RATIOS, importance="weight"),
    "s2ft_sparsity": sparseft.S2FTConfig(
        sparsity=0.7, roles=["v", "up", "down"], order="smallest", importance="weight"
    ),
    "sylva_8": sparseft.SylvaConfig(importance="weight", sparsity=0.9, block_size=8, allocation="global"),
    "sylva_16": sparseft.SylvaConfig(importance="random", sparsity=0.8, block_size=16),  # with edge blocks
    "sylva_64": sparseft.SylvaConfig(importance="random", block_size=64, scope="mlp"),  # larger than one side
    "mixed": sparseft.SylvaConfig(block_size=32),  # rows, columns and blocks of one module, overlapping
}
# A method that has no settings above goes through all of this with its own defaults.
for name in METHODS:
    if get_method(name).sparse and all(type(config) is not get_method(name) for config in SPARSE.values()):
        SPARSE[name] = get_method(name)().for_benchmark()
OTHERS: dict[str, Any] = {
    "lora": sparseft.LoraConfig(rank=3, dropout=0.0),
    "dora": sparseft.DoraConfig(rank=3, dropout=0.0),
    "full": sparseft.FullConfig(dtype="model"),
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES))
each_sparse = pytest.mark.parametrize("method", list(SPARSE))
each_other = pytest.mark.parametrize("method", list(OTHERS))
each_method = pytest.mark.parametrize("method", [*SPARSE, *OTHERS])
# transformers 5 renames the method; peft and these tests call it by the name that 5.0 has too
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
Make = Callable[..., Any]


def attach(model: Any, method: str) -> Any:
    if method in OTHERS:
        return sparseft.attach(model, OTHERS[method])
    config, selection = SPARSE[method], None
    if method == "s2ft_all" and "gate" not in {s.role for s in ModelSpec.of(model).slots}:
        config = sparseft.S2FTConfig(**{k: v for k, v in ALL_RATIOS.items() if k != "g_ratio"}, importance="weight")
    if method == "mixed":
        names = list(ModelSpec.of(model).linears)
        kinds = {"rows": [0, 40, 3], "columns": [47, 2], "blocks": [[1, 1], [0, 0]], "grid": ([3, 7, 0], [47, 5])}
        selection = Selection({names[0]: kinds, names[-1]: {"blocks": [[1, 2]]}})
    return sparseft.attach(model, config, selection)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch(99)["input_ids"]).logits


def train(model: Any, steps: int = 3, lr: float = 1e-2) -> None:
    """AdamW with weight decay and clipping, two micro-batches a step."""
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        for micro in range(2):
            (model(**batch(2 * step + micro)).loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Any) -> dict[str, Tensor]:
    """The base model's own tensors, copied: without what the adapter adds."""
    kinds = ("rows", "columns", "blocks", "grid")
    return {n: t.clone() for n, t in model.state_dict().items() if n.rsplit(".", 2)[-2] not in kinds}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def part(dense: Tensor, kind: str, index: list, size: int | None) -> Tensor:
    """The pattern's entries of a logical (out, in) matrix, by slicing one after another."""
    if kind == "rows":
        return torch.stack([dense[i, :] for i in index])
    if kind == "columns":
        return torch.stack([dense[:, i] for i in index], dim=1)
    if kind == "grid":
        return torch.stack([dense[i, j] for i, j in crossings(index)])
    values = torch.zeros(len(index), size, size, dtype=dense.dtype)
    for n, (r, c) in enumerate(index):
        block = dense[r * size : r * size + size, c * size : c * size + size]
        values[n, : block.shape[0], : block.shape[1]] = block
    return values


def crossings(index: list[int]) -> list[tuple[int, int]]:
    """The entries (row, column) of one grid, row by row."""
    return [(i, -1 - j) for i in index if i >= 0 for j in index if j < 0]


def mask(shape: torch.Size, layer: SparseLinear) -> Tensor:
    """Which entries of the stored weight the layer's patterns cover."""
    covered = torch.zeros(shape, dtype=torch.bool)
    view = covered.t() if layer.transposed else covered
    for kind, pattern in layer.patterns.items():
        if kind == "grid":
            for i, j in crossings(pattern.index.tolist()):
                view[i, j] = True
            continue
        for item in pattern.index.tolist():
            if kind == "rows":
                view[item, :] = True
            elif kind == "columns":
                view[:, item] = True
            else:
                size = pattern.block_size
                view[item[0] * size : item[0] * size + size, item[1] * size : item[1] * size + size] = True
    return covered


@pytest.fixture(scope="module")
def trained(make_model: Make) -> Callable[[str, str, str], tuple[Any, dict[str, Tensor]]]:
    """`trained(method, kind, dtype)`: a copy of a model that took four steps, each trained once, and the base's
    tensors."""
    made: dict[tuple[str, str, str], tuple[Any, dict[str, Tensor]]] = {}

    def copied(method: str, kind: str, dtype: str) -> tuple[Any, dict[str, Tensor]]:
        key = method, kind, dtype
        if key not in made:
            model = make_model(kind, DTYPES[dtype])
            before = weights(model)
            model = attach(model, method)
            train(model, steps=4)
            made[key] = model, before
        model, before = made[key]
        return copy.deepcopy(model), before

    return copied


# ---- attach ----


@each_method
@each_kind
@each_dtype
def test_fresh_attach_changes_no_bit_of_the_logits(make_model: Make, method: str, kind: str, dtype: str) -> None:
    model = make_model(kind, DTYPES[dtype])
    expected, mode = logits(model), model.training
    model = attach(model, method)
    assert model.training == mode
    if method == "dora" and dtype == "bf16":  # peft divides two norms that it rounds apart: 1 ± a step of bf16
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    else:
        assert torch.equal(logits(model), expected)


@each_sparse
@each_kind
def test_attach_keeps_class_and_names(make_model: Make, method: str, kind: str) -> None:
    model, plain = make_model(kind), make_model(kind)
    before = weights(model)
    attached = attach(model, method)
    assert attached is model and type(model) is type(plain)
    assert same(weights(model), before)
    assert [n for n, _ in plain.named_modules()] == [
        n for n, m in model.named_modules() if not getattr(m, "sparseft_pattern", False)
    ]


@each_method
@each_kind
@each_dtype
def test_only_the_adapter_gets_gradients(make_model: Make, method: str, kind: str, dtype: str) -> None:
    model = attach(make_model(kind, DTYPES[dtype]), method)
    trainable = sparseft.trainable_parameters(model)
    model(**batch()).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trainable)
    if method in SPARSE:
        assert all(n.endswith((".rows.delta", ".columns.delta", ".blocks.delta", ".grid.delta")) for n in trainable)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable.values())
    elif method in ("lora", "dora"):
        assert trainable and all("lora_" in n for n in trainable)
    else:
        assert len(trainable) == len(list(model.parameters()))


@each_sparse
@each_kind
@each_dtype
def test_gradients_equal_autograds_dense_ones(make_model: Make, method: str, kind: str, dtype: str) -> None:
    dense = make_model(kind, DTYPES[dtype])
    model = attach(make_model(kind, DTYPES[dtype]), method)
    loss, expected_loss = model(**batch()).loss, dense(**batch()).loss
    assert torch.equal(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    layers = sparse_layers(model)
    assert layers
    for name, layer in layers.items():
        gradient = dense.get_submodule(name).weight.grad
        gradient = (gradient.t() if kind == "gpt2" else gradient).float()
        for pattern_kind, pattern in layer.patterns.items():
            expected = part(gradient, pattern_kind, pattern.index.tolist(), pattern.block_size)
            # bf16 rounds the very same products: a step of bf16 apart where they are added up in another order
            tolerance = 1e-5 if dtype == "fp32" else 2**-7
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(pattern.delta.grad, expected, rtol=tolerance, atol=tolerance * scale)


# ---- train ----


@each_sparse
@each_kind
@each_dtype
def test_what_is_not_selected_never_changes_by_a_bit(trained: Make, method: str, kind: str, dtype: str) -> None:
    model, before = trained(method, kind, dtype)
    after = weights(model)
    layers = sparse_layers(model)
    changed = 0
    for name, old in before.items():
        new = after[name]
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            assert torch.equal(old, new), name
            continue
        covered = mask(old.shape, layer)
        assert torch.equal(old[~covered], new[~covered]), name
        assert (old[covered] != new[covered]).float().mean() > 0.8, name  # and what is selected does train
        changed += 1
    assert changed == len(layers)


@each_other
def test_training_lowers_the_loss(make_model: Make, method: str) -> None:
    """Of sparse methods the gradients above say as much."""
    model = attach(make_model("llama"), method)
    with torch.no_grad():
        first = sum(model(**batch(i)).loss for i in range(4))
    train(model, steps=4, lr=3e-3)
    with torch.no_grad():
        assert sum(model(**batch(i)).loss for i in range(4)) < first


def test_a_masked_dense_run_learns_the_same(make_model: Make) -> None:
    """The whole training against a plain model whose gradients are masked: the same losses, the same weights."""
    model = attach(make_model("llama"), "sylva_8")
    masks = {n: mask(layer.weight.shape, layer) for n, layer in sparse_layers(model).items()}
    dense = make_model("llama").requires_grad_(False)
    for name, covered in masks.items():
        weight = dense.get_submodule(name).weight.requires_grad_(True)
        weight.register_hook(lambda grad, covered=covered: grad * covered)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5, momentum=0.9) for m in (model, dense)
    ]
    for step in range(5):
        losses = [m(**batch(step)).loss for m in (model, dense)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in masks:
        left, right = model.get_submodule(name).weight, dense.get_submodule(name).weight
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-4, atol=1e-5)


# ---- leave, save, reload ----


@each_sparse
@each_kind
@each_dtype
def test_merged_attached_saved_and_reloaded_agree_to_the_bit(
    make_model: Make, trained: Make, tmp_path: Path, method: str, kind: str, dtype: str
) -> None:
    model, _ = trained(method, kind, dtype)
    attached = logits(model)
    assert not torch.equal(attached, logits(make_model(kind, DTYPES[dtype])))
    sparseft.save_adapter(model, tmp_path / "adapter")
    reloaded = sparseft.load_adapter(make_model(kind, DTYPES[dtype]), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), attached)
    assert same(weights(reloaded), weights(model))
    merged = sparseft.merge(model)
    assert merged is model and not sparse_layers(model) and torch.equal(logits(merged), attached)
    assert not any("delta" in name for name in merged.state_dict())
    plain = make_model(kind, DTYPES[dtype])
    plain.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(logits(plain), attached)


@each_sparse
@each_kind
@each_dtype
def test_detach_restores_every_bit(trained: Make, method: str, kind: str, dtype: str) -> None:
    model, before = trained(method, kind, dtype)
    detached = sparseft.detach(model)
    assert detached is model and same(model.state_dict(), before)


@each_sparse
@each_kind
def test_detach_gives_back_the_model_that_there_was(make_model: Make, method: str, kind: str) -> None:
    model = make_model(kind, torch.bfloat16)
    model.lm_head.requires_grad_(False)  # flags of the caller's own
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    train(attach(model, method).train())
    detached = sparseft.detach(model)
    assert all(m.training for m in model.modules())  # the mode of the model as it is now
    assert detached is model and same(model.state_dict(), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules  # the very same modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert attach(model, method) is model  # and ready for another


@each_sparse
@each_kind
def test_switching_off_and_on(make_model: Make, trained: Make, method: str, kind: str) -> None:
    model, base_weights = trained(method, kind, "bf16")
    base = logits(make_model(kind, torch.bfloat16))
    learnt, learnt_weights = logits(model), weights(model)
    names = set(sparseft.trainable_parameters(model))
    for _ in range(2):
        sparseft.set_adapter(model, None)
        assert torch.equal(logits(model), base) and same(weights(model), base_weights)
        assert sparseft.trainable_parameters(model) == {}
        sparseft.set_adapter(model, "default")
        assert torch.equal(logits(model), learnt) and same(weights(model), learnt_weights)
        assert set(sparseft.trainable_parameters(model)) == names


@pytest.mark.parametrize("method", ["lora", "dora"])
@each_kind
@each_dtype
def test_peft_methods(make_model: Make, tmp_path: Path, method: str, kind: str, dtype: str) -> None:
    plain = make_model(kind, DTYPES[dtype])
    plain.lm_head.requires_grad_(False)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    types = {n: type(m) for n, m in plain.named_modules()}
    base = logits(plain)
    model = attach(plain, method)
    train(model)
    attached = logits(model)
    assert not torch.equal(attached, base)
    sparseft.save_adapter(model, tmp_path / "adapter")
    reloaded = sparseft.load_adapter(make_model(kind, DTYPES[dtype]), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), attached)
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), base) and sparseft.trainable_parameters(model) == {}
    sparseft.set_adapter(model, "default")
    assert torch.equal(logits(model), attached) and sparseft.trainable_parameters(model)
    merged = sparseft.merge(reloaded)
    scale = float(attached.float().abs().max())
    torch.testing.assert_close(logits(merged), attached, rtol=0, atol=scale * (1e-5 if dtype == "fp32" else 6e-2))
    detached = sparseft.detach(model)
    assert detached is plain and same(plain.state_dict(), before) and torch.equal(logits(plain), base)
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == flags
    assert {n: type(m) for n, m in plain.named_modules()} == types


@each_kind
@each_dtype
def test_full(make_model: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    model = attach(make_model(kind, DTYPES[dtype]), "full")
    train(model)
    attached = logits(model)
    sparseft.save_adapter(model, tmp_path / "adapter")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=DTYPES[dtype])
    assert same(dict(reloaded.state_dict()), dict(model.state_dict()))
    with pytest.raises(UserError, match="a whole model, not an adapter"):
        sparseft.load_adapter(make_model(kind), tmp_path / "adapter")
    with pytest.raises(UserError, match="keeps no copy of the base"):
        sparseft.detach(model)
    with pytest.raises(UserError, match="no adapters to switch"):
        sparseft.set_adapter(model, None)
    merged = sparseft.merge(model)
    assert torch.equal(logits(merged), attached)
    with pytest.raises(UserError, match="no adapter"):
        sparseft.merge(merged)


def test_full_trains_in_float32_unless_told_otherwise(make_model: Make) -> None:
    model = sparseft.attach(make_model("llama", torch.bfloat16), sparseft.FullConfig())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---- what an attached model must still do ----


@each_kind
def test_casting_an_attached_model(make_model: Make, kind: str) -> None:
    model = attach(make_model(kind), "s2ft_o_d")
    train(model)
    fine = {n: p.detach().clone() for n, p in sparseft.trainable_parameters(model).items()}
    model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if n not in fine} == {torch.bfloat16}
    for name, parameter in sparseft.trainable_parameters(model).items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, fine[name])
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), logits(make_model(kind, torch.bfloat16)))
    sparseft.set_adapter(model, "default")
    train(model, steps=1)
    assert not torch.equal(logits(sparseft.merge(model)), logits(make_model(kind, torch.bfloat16)))


@each_kind
@pytest.mark.parametrize("method", ["s2ft_all", "mixed"])
def test_deepcopy_trains_on_its_own(make_model: Make, kind: str, method: str) -> None:
    model = attach(make_model(kind), method)
    train(model, steps=1)
    before, before_weights = logits(model), weights(model)
    twin = copy.deepcopy(model)
    train(twin, steps=2)
    assert torch.equal(logits(model), before) and same(weights(model), before_weights)
    assert not torch.equal(logits(twin), before)
    sparseft.detach(twin)
    assert torch.equal(logits(twin), logits(make_model(kind)))
    sparseft.detach(model)
    assert torch.equal(logits(model), logits(twin))


@each_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make_model: Make, kind: str, reentrant: bool) -> None:
    plain, model = (attach(make_model(kind), "mixed").train() for _ in range(2))
    plain(**batch()).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # reentrant checkpoints only reach what an input's gradient leads to
    model(**batch()).loss.backward()
    for (name, a), b in zip(
        sparseft.trainable_parameters(plain).items(), sparseft.trainable_parameters(model).values(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@each_kind
def test_generate_and_state_dict(make_model: Make, kind: str) -> None:
    model = attach(make_model(kind), "s2ft_all")
    train(model)
    ids = batch()["input_ids"][:1, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    written = model.generate(ids, **options)
    other = attach(make_model(kind, seed=1), "s2ft_all")
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other), logits(model))
    merged = sparseft.merge(model)
    assert torch.equal(merged.generate(ids, **options), written)
    # a plain checkpoint is a new base
    other.load_state_dict(make_model(kind, seed=2).state_dict(), strict=True)
    assert torch.equal(logits(other), logits(make_model(kind, seed=2)))
    assert not any(p.any() for p in sparseft.trainable_parameters(other).values())


def test_compiled_model_trains_the_same(make_model: Make) -> None:
    torch._dynamo.reset()
    eager, model = attach(make_model("llama"), "sylva_8"), attach(make_model("llama"), "sylva_8")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for m, run in ((eager, eager), (model, compiled)):
        optimizer = torch.optim.AdamW(sparseft.trainable_parameters(m).values(), lr=1e-3)
        for step in range(2):
            run(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(model), logits(eager), rtol=1e-4, atol=1e-4)


def test_inputs_that_need_no_adapter(make_model: Make) -> None:
    model = make_model("llama")
    for action in (sparseft.detach, sparseft.merge, lambda m: sparseft.set_adapter(m, None)):
        with pytest.raises(UserError, match="has no adapter"):
            action(model)
    attach(model, "s2ft")
    with pytest.raises(UserError, match="has an adapter already"):
        attach(model, "lora")
    with pytest.raises(TypeError, match="method's config"):
        sparseft.attach(make_model("llama"), {"sparsity": 0.9})


@pytest.mark.parametrize("method", ["s2ft", "sylva_16", "mixed"])
def test_adapters_under_inference_mode(make_model: Make, tmp_path: Path, method: str) -> None:
    """Tensors made there keep no count of changes, by which a layer sees that its delta was changed by hand."""
    model = attach(make_model("llama"), method)
    train(model)
    sparseft.save_adapter(model, tmp_path / "adapter")
    expected = logits(model)
    served, base = make_model("llama"), logits(make_model("llama"))
    with torch.inference_mode():
        sparseft.load_adapter(served, tmp_path / "adapter")
        assert torch.equal(logits(served), expected)
        copied = copy.deepcopy(served)
        sparseft.set_adapter(served, None)
        assert torch.equal(logits(served), base)
        sparseft.set_adapter(served, "default")
        assert torch.equal(logits(copied), expected) and torch.equal(logits(copied.double().float()), expected)
    assert torch.equal(logits(served), expected)
    assert torch.equal(logits(sparseft.detach(served)), base)


def test_every_exported_name_works() -> None:
    assert set(sparseft.__all__) <= set(dir(sparseft))
    for name in sparseft.__all__:
        assert getattr(sparseft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = sparseft.atach
