"""Adapter folders, switching and fusing, and everything that must be refused without a trace."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparseft
from sparseft.adapters.lifecycle import trainable_count
from sparseft.adapters.sparse import SparseDelta, split_blocks, unite
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.methods.sylva import BLOCK_SIZES
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection
from support.models import tiny_config

# transformers 5 renames the method; peft and these tests call it by the name that 5.0 has too
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
Make = Callable[..., Any]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP, Q = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
SHAPES = {DOWN: (48, 80), UP: (80, 48), Q: (72, 48)}
OWN = {DOWN: {"columns": [7, 0, 79], "rows": [3]}, UP: {"blocks": [[2, 1], [0, 0]]}}  # (2, 1): an edge block of 32


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 15)[None]).logits


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """Random deltas as training leaves them (zero outside the weight); seen at the next forward."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse_layers(model).values():
        for pattern in layer.patterns.values():
            pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * 0.3)
            if pattern.kind == "blocks":
                for n, (r, c) in enumerate(pattern.index.tolist()):
                    pattern.delta[n, max(0, layer.out_features - r * pattern.block_size) :] = 0
                    pattern.delta[n, :, max(0, layer.in_features - c * pattern.block_size) :] = 0
    return model


def attached(model: Any, modules: dict[str, Any] | None = None, seed: int = 0, size: int = 32) -> Any:
    selection = Selection(modules or OWN, block_size=size)
    config = sparseft.SylvaConfig(block_size=size if size in BLOCK_SIZES else 64)  # the selection's own size counts
    return randomise(sparseft.attach(model, config, selection), seed)


def dense_delta(folder: Path, module: str) -> Tensor:
    """What a saved adapter adds to a module's weight (out, in): from the files alone, entry by entry."""
    tensors, size = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())["block_size"]
    total = torch.zeros(SHAPES[module])
    for kind in ("rows", "columns", "blocks"):
        if f"{module}.{kind}.index" not in tensors:
            continue
        index, delta = tensors[f"{module}.{kind}.index"].tolist(), tensors[f"{module}.{kind}.delta"]
        for n, item in enumerate(index):
            if kind == "rows":
                total[item] += delta[n]
            elif kind == "columns":
                total[:, item] += delta[:, n]
            else:
                view = total[item[0] * size : (item[0] + 1) * size, item[1] * size : (item[1] + 1) * size]
                view += delta[n, : view.shape[0], : view.shape[1]]
    return total


def state(model: Any) -> dict[str, Any]:
    """All that a refused call must leave as it was."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": set(vars(model)),
        "logits": logits(model),
    }


def assert_same_state(before: dict[str, Any], model: Any) -> None:
    after = state(model)
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())
    assert torch.equal(before["logits"], after["logits"])
    for what in ("flags", "types", "modes", "attributes"):
        assert before[what] == after[what], what


# ---- files ----


def test_file_format(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", torch.bfloat16)
    fingerprint = base_fingerprint(model)
    attached(model)
    folder = sparseft.save_adapter(model, tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    tensors = load_file(folder / TENSORS)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        f"{DOWN}.columns.index": (torch.int32, (3,)),
        f"{DOWN}.columns.delta": (torch.float32, (48, 3)),
        f"{DOWN}.rows.index": (torch.int32, (1,)),
        f"{DOWN}.rows.delta": (torch.float32, (1, 80)),
        f"{UP}.blocks.index": (torch.int32, (2, 2)),
        f"{UP}.blocks.delta": (torch.float32, (2, 32, 32)),
    }
    assert tensors[f"{DOWN}.columns.index"].tolist() == [7, 0, 79]
    assert tensors[f"{UP}.blocks.index"].tolist() == [[2, 1], [0, 0]]
    layers = sparse_layers(model)
    assert torch.equal(tensors[f"{DOWN}.columns.delta"], layers[DOWN].patterns["columns"].delta)
    assert not tensors[f"{UP}.blocks.delta"][0, 16:].any() and not tensors[f"{UP}.blocks.delta"][0, :, 16:].any()
    config = json.loads((folder / CONFIG).read_text())
    assert set(config) >= {"format_version", "method", "base_model", "base_fingerprint", "method_config", "modules"}
    assert config["method"] == "sylva" and config["base_fingerprint"] == fingerprint
    assert config["method_config"]["block_size"] == 32 and config["format_version"] == 1
    assert config["modules"] == {
        DOWN: {"shape": [48, 80], "columns": 3, "rows": 1},
        UP: {"shape": [80, 48], "blocks": 2},
    }
    assert trainable_count(model) == 3 * 48 + 80 + 32 * 32 + 16 * 16
    # the file alone says what was learnt
    base = make_model("llama", torch.bfloat16)
    for module in (DOWN, UP):
        expected = (base.get_submodule(module).weight.float() + dense_delta(folder, module)).bfloat16()
        logits(model)
        assert torch.equal(model.get_submodule(module).weight, expected)


def test_conv1d_indices_are_logical(make_model: Make, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_proj"  # logical (48, 80), stored (80, 48)
    model = attached(make_model("gpt2"), {name: {"columns": [79, 1], "rows": [47]}})
    folder = sparseft.save_adapter(model, tmp_path / "a")
    tensors = load_file(folder / TENSORS)
    assert tensors[f"{name}.columns.delta"].shape == (48, 2) and tensors[f"{name}.rows.delta"].shape == (1, 80)
    expected = make_model("gpt2").get_submodule(name).weight.detach().t().clone()
    expected[:, [79, 1]] += tensors[f"{name}.columns.delta"]
    expected[47] += tensors[f"{name}.rows.delta"][0]
    torch.testing.assert_close(sparseft.merge(model).get_submodule(name).weight.t(), expected)


def test_saving_over_an_adapter_and_refusing_other_folders(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(make_model("llama"))
    for seed in (1, 2):
        randomise(model, seed)
        sparseft.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(sparseft.load_adapter(make_model("llama"), tmp_path / "a")), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a/x.gguf").write_text("hours of work")
    with pytest.raises(UserError, match=r"holds other files, which would be lost \('x.gguf'\)"):
        sparseft.save_adapter(model, tmp_path / "a")
    (tmp_path / "a/x.gguf").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").write_text("print()")
    with pytest.raises(UserError, match="holds other files"):
        sparseft.save_adapter(model, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(UserError, match=r"\.: cannot be replaced, as you are in it: name a folder in it"):
        sparseft.save_adapter(model, ".")
    assert Path.cwd() == tmp_path / "a"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["a", CONFIG, TENSORS, "mine", "code.py"])
    with pytest.raises(UserError, match="no adapter is called 'defualt'. Did you mean 'default'"):
        sparseft.save_adapter(model, tmp_path / "b", "defualt")
    sparseft.set_adapter(model, None)
    with pytest.raises(UserError, match="no adapter is active"):
        sparseft.save_adapter(model, tmp_path / "b")
    sparseft.save_adapter(model, tmp_path / "b", "default")  # parked, and saved all the same
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    with pytest.raises(UserError, match="no adapter"):
        sparseft.save_adapter(make_model("llama"), tmp_path / "c")


# ---- refusing ----


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors and nothing else."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / TENSORS)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    """Changes the tensors and makes the hash fit again, as another program might."""
    change_tensors(folder, change)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    edit(folder, sha256=digest, **config)


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-3] ^= 4
    (folder / TENSORS).write_bytes(bytes(content))


def truncate(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) - 100])


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda t: t.update({name: value(t[name])}))


COLUMNS, BLOCKS = f"{DOWN}.columns", f"{UP}.blocks"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "truncated or damaged"),
    "flipped bit": (flip_bit, "altered"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "no such file"),
    "no config": (lambda f: (f / CONFIG).unlink(), "no such file"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object"),
    "other format": (lambda f: edit(f, format_version=7), "adapter format 7"),
    "no fingerprint": (lambda f: edit(f, base_fingerprint=...), "another base"),
    "altered tensor": (lambda f: change_tensors(f, lambda t: t[f"{COLUMNS}.delta"].add_(1)), "altered"),
    "delta missing": (lambda f: rewrite(f, lambda t: t.pop(f"{COLUMNS}.delta")), "needs index and delta"),
    "index missing": (lambda f: rewrite(f, lambda t: t.pop(f"{COLUMNS}.index")), "needs index and delta"),
    "module missing": (
        lambda f: rewrite(f, lambda t: [t.pop(f"{BLOCKS}.{p}") for p in ("index", "delta")]),
        "is only in adapter_config",
    ),
    "all missing": (lambda f: rewrite(f, lambda t: t.clear()), "holds no module"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update({"extra": torch.ones(1)})), "unexpected tensor 'extra'"),
    "extra module": (
        lambda f: rewrite(
            f, lambda t: t.update({f"{Q}.rows.index": torch.zeros(1).int(), f"{Q}.rows.delta": torch.ones(1, 48)})
        ), "is only in adapter_model",
    ),
    "renamed kind": (
        lambda f: rewrite(f, lambda t: t.update({f"{DOWN}.cols.delta": t.pop(f"{COLUMNS}.delta")})),
        "unexpected tensor",
    ),
    "renamed module": (
        lambda f: rewrite(
            f, lambda t: [t.update({f"model.nowhere.columns.{p}": t.pop(f"{COLUMNS}.{p}")}) for p in ("index", "delta")]
        ), "is only in",
    ),
    "unknown module": (
        lambda f: rewrite(
            f, lambda t: [t.update({f"{n.replace('0.mlp', '9.mlp')}": t.pop(n)}) for n in list(t)],
            modules={DOWN.replace("0.mlp", "9.mlp"): {"columns": 3, "rows": 1}, UP: {"blocks": 2}},
        ), "has no module .*9.mlp.down_proj.*Did you mean",
    ),
    "no linear": (
        lambda f: rewrite(
            f, lambda t: [t.update({n.replace(DOWN, "lm_head"): t.pop(n)}) for n in list(t)],
            modules={"lm_head": {"columns": 3, "rows": 1}, UP: {"blocks": 2}},
        ), "'lm_head' is a Linear, not a linear layer of the decoder",
    ),
    "counts differ": (lambda f: edit(f, modules={DOWN: {"columns": 2, "rows": 1}, UP: {"blocks": 2}}), "lists"),
    "modules a list": (lambda f: edit(f, modules=[1]), "needs modules"),
    "half precision": (replaced(f"{COLUMNS}.delta", Tensor.half), "float32 delta"),
    "long index": (replaced(f"{COLUMNS}.index", Tensor.long), "int32 index"),
    "float index": (replaced(f"{COLUMNS}.index", Tensor.float), "int32 index"),
    "scalar index": (replaced(f"{COLUMNS}.index", lambda t: t[0]), "must be a list"),
    "delta transposed": (replaced(f"{COLUMNS}.delta", Tensor.t), r"shape \(3, 48\) does not fit the model's \(48, 3\)"),
    "blocks flat": (replaced(f"{BLOCKS}.index", lambda t: t[:, 0]), "pairs"),
    "out of range": (replaced(f"{COLUMNS}.index", lambda t: t + 1), "outside 0 … 79"),
    "negative": (replaced(f"{COLUMNS}.index", lambda t: -t), "outside 0 … 79"),
    "twice": (replaced(f"{COLUMNS}.index", lambda t: t * 0), "twice"),
    "blocks out of range": (replaced(f"{BLOCKS}.index", lambda t: t + 1), "outside"),
    "nan": (replaced(f"{COLUMNS}.delta", lambda t: t * float("nan")), "not finite"),
    "other block size": (lambda f: edit(f, block_size=16), "does not fit|outside"),
    "block size text": (lambda f: edit(f, block_size="32"), "block_size='32'"),
    "block size true": (lambda f: edit(f, block_size=True), "block_size=True"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparseft.save_adapter(attached(make_model("llama")), tmp_path_factory.mktemp("good") / "adapter")


def test_the_keys_of_the_format_are_enough(make_model: Make, good: Path, tmp_path: Path) -> None:
    """Another program may leave out our hash, and the block size that the deltas show."""
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    edit(folder, sha256=..., block_size=...)
    left, right = (sparseft.load_adapter(make_model("llama"), source) for source in (good, folder))
    assert_same_state(state(left), right)


def test_pickled_peft_weights_are_not_loaded(make_model: Make, tmp_path: Path) -> None:
    sparseft.save_adapter(sparseft.attach(make_model("llama"), sparseft.LoraConfig(rank=2)), tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / TENSORS)
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    (tmp_path / "lora" / TENSORS).unlink()
    with pytest.raises(UserError, match="pickle"):
        sparseft.load_adapter(make_model("llama"), tmp_path / "lora")


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damaged_adapters_are_refused(make_model: Make, good: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    damage(folder)
    plain = make_model("llama")
    before = state(plain)
    with pytest.raises(UserError, match=message):
        sparseft.load_adapter(plain, folder)
    assert_same_state(before, plain)
    busy = attached(plain, {Q: {"rows": [1]}, UP: {"columns": [3]}}, seed=3)
    before = state(busy)
    for name in ("default", "other"):
        with pytest.raises(UserError, match=message):
            sparseft.load_adapter(busy, folder, name)
        assert_same_state(before, busy)
    with pytest.raises(UserError, match="no adapter is called 'other'"):
        sparseft.set_adapter(busy, "other")


def test_another_base_is_refused(make_model: Make, good: Path) -> None:
    for other in (make_model("llama", seed=1), make_model("qwen2")):
        before = state(other)
        with pytest.raises(UserError, match="made for another base model"):
            sparseft.load_adapter(other, good)
        assert_same_state(before, other)
    assert sparseft.load_adapter(make_model("llama"), good) is not None


def test_load_dtype_does_not_matter(make_model: Make, good: Path, tmp_path: Path) -> None:
    model = attached(make_model("llama", torch.bfloat16))
    folder = sparseft.save_adapter(model, tmp_path / "a")
    fine = sparseft.load_adapter(make_model("llama", torch.bfloat16).float(), folder)
    for left, right in zip(
        sparseft.trainable_parameters(model).values(), sparseft.trainable_parameters(fine).values(), strict=True
    ):
        assert torch.equal(left, right)


STORED_LOADED = [
    (torch.float32, torch.float16, torch.float32), (torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.bfloat16, torch.float32), (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.float16), (torch.float16, torch.float16, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "trained", "loaded"), STORED_LOADED, ids=str)
@pytest.mark.parametrize(
    "config", [sparseft.S2FTConfig(d_ratio=0.1), sparseft.LoraConfig(rank=2)], ids=["s2ft", "lora"]
)
def test_the_same_base_in_another_dtype(
    make_model: Make, tmp_path: Path, config: Any, stored: torch.dtype, trained: torch.dtype, loaded: torch.dtype
) -> None:
    model = sparseft.attach(make_model("llama", stored).to(trained), config)
    folder = sparseft.save_adapter(model, tmp_path / "a")
    sparseft.load_adapter(make_model("llama", stored).to(loaded), folder)
    with pytest.raises(UserError, match="made for another base model"):
        sparseft.load_adapter(make_model("llama", stored, seed=1).to(loaded), folder)


def test_an_adapter_of_before_knows_its_base_in_another_dtype(make_model: Make, tmp_path: Path) -> None:
    """Its only fingerprint is what `base_fingerprint` gives of the base in fp16."""
    model = sparseft.attach(make_model("llama").half(), sparseft.S2FTConfig(d_ratio=0.1))
    folder = sparseft.save_adapter(model, tmp_path / "a")
    edit(folder, other_fingerprints=..., base_dtype=..., base_fingerprint=base_fingerprint(make_model("llama").half()))
    assert base_fingerprint(make_model("llama").half()) != base_fingerprint(make_model("llama"))
    sparseft.load_adapter(make_model("llama"), folder)
    with pytest.raises(UserError, match="it was loaded in another dtype then, in bfloat16 now"):
        sparseft.load_adapter(make_model("llama").bfloat16(), folder)


def test_what_no_dtype_tells_names_both(make_model: Make, tmp_path: Path) -> None:
    """fp16 and bf16 of an fp32 checkpoint: neither can be rounded to the other."""
    model = sparseft.attach(make_model("llama").half(), sparseft.S2FTConfig(d_ratio=0.1))
    folder = sparseft.save_adapter(model, tmp_path / "a")
    with pytest.raises(UserError, match="loaded in float16 then, in bfloat16 now \\(model.dtype\\)"):
        sparseft.load_adapter(make_model("llama").bfloat16(), folder)


def test_a_missing_folder(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        sparseft.load_adapter(make_model("llama"), tmp_path / "nowhere")


SELECTIONS: dict[str, tuple[Any, str]] = {
    "out of range": ({DOWN: {"columns": [80]}}, "down_proj: columns: an index lies outside 0 … 79"),
    "second bad": ({UP: {"rows": [0]}, DOWN: {"rows": [0, 0]}}, "down_proj: rows: an index occurs twice"),
    "unknown": ({"model.layers.0.mlp.donw_proj": {"rows": [0]}}, "has no module .*Did you mean"),
    "lm_head": ({"lm_head": {"rows": [0]}}, "'lm_head' is a Linear, not a linear layer of the decoder"),
    "embedding": ({"model.embed_tokens": {"rows": [0]}}, "is a Embedding"),
    "block": ({"model.layers.0.mlp": {"rows": [0]}}, "is a LlamaMLP"),
    "no block size": ({UP: {"blocks": [[0, 0]]}}, "needs its block_size: Selection"),
    "empty": ({}, "the selection is empty"),
}


@pytest.mark.parametrize("case", list(SELECTIONS))
def test_bad_selections_are_refused(make_model: Make, case: str) -> None:
    modules, message = SELECTIONS[case]
    model = make_model("llama")
    before = state(model)
    with pytest.raises(UserError, match=message):
        sparseft.attach(model, sparseft.S2FTConfig(), Selection(modules))
    assert_same_state(before, model)
    with pytest.raises(UserError, match="takes no selection"):
        sparseft.attach(model, sparseft.LoraConfig(), Selection({DOWN: {"rows": [0]}}))
    with pytest.raises(UserError, match="needs data"):
        sparseft.attach(model, sparseft.SylvaConfig())
    assert_same_state(before, model)


def test_tied_weights_are_refused(make_model: Make) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = state(model)
    with pytest.raises(UserError, match="tied to 'model.layers.0.mlp.up_proj.weight'"):
        sparseft.attach(model, sparseft.S2FTConfig(), Selection({UP: {"rows": [0]}}))
    with pytest.raises(UserError, match="is tied to"):
        sparseft.attach(model, sparseft.SylvaConfig(importance="random", block_size=8))
    assert_same_state(before, model)
    with pytest.raises(UserError, match="is tied to"):
        sparseft.attach(model, sparseft.LoraConfig(rank=2))  # merging it would change the other
    assert_same_state(before, model)
    sparseft.attach(model, sparseft.S2FTConfig(), Selection({DOWN: {"rows": [0]}}))  # what is not tied trains


def test_peft_layers_of_others_are_refused(make_model: Make, good: Path) -> None:
    import peft

    model = make_model("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for inner in (wrapped, model):
        for config in (sparseft.S2FTConfig(), sparseft.LoraConfig(rank=2)):
            with pytest.raises(UserError, match="has an adapter already"):
                sparseft.attach(inner, config)
        with pytest.raises(UserError, match="peft's layers"):
            sparseft.load_adapter(inner, good)
    sparseft.attach(wrapped.merge_and_unload(), sparseft.S2FTConfig())


@pytest.mark.parametrize("method", [sparseft.S2FTConfig, sparseft.LoraConfig, sparseft.FullConfig])
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_models_that_predict_no_tokens_are_refused(kind: str, method: Any) -> None:
    """Their heads are new: they would stay random, and be in no adapter. A backbone has none to lose."""
    backbone = transformers.LlamaModel(tiny_config("llama"))
    if method is sparseft.LoraConfig:
        with pytest.raises(UserError, match="^method lora: LlamaModel does not generate"):
            sparseft.attach(backbone, method())
    else:
        sparseft.attach(backbone, method())
    model = getattr(transformers, kind)(tiny_config("llama"))
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=f"^{kind} has no head that predicts tokens"):
        sparseft.attach(model, method())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [sparseft.LosiaConfig(importance="random"), sparseft.S2FTConfig(reselect_steps=5)])
def test_choosing_anew_that_nobody_does_is_warned_about(
    make_model: Make, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sparseft.attach(make_model("llama"), config)
    steps = f"warning: method.reselect_steps={config.reselect_steps}: choosing anew is done by `sparseft train` alone"
    assert steps in " ".join(capsys.readouterr().err.split())
    model = make_model("llama")
    sparseft.attach(model, config, spec=ModelSpec.of(model))  # as training gives it
    sparseft.attach(make_model("llama"), dataclasses.replace(config, reselect_steps=0))
    assert "choosing anew" not in capsys.readouterr().err


def test_a_selection_that_is_none_is_refused(make_model: Make) -> None:
    with pytest.raises(UserError, match="expected a sparseft.Selection, got dict"):
        sparseft.attach(make_model("llama"), sparseft.S2FTConfig(), {DOWN: {"rows": [0]}})


def test_compiled_models(make_model: Make, tmp_path: Path) -> None:
    compiled = torch.compile(make_model("llama"), backend="eager")
    config = sparseft.S2FTConfig(d_ratio=0.2)
    assert sparseft.attach(compiled, config) is compiled
    parameters = sparseft.trainable_parameters(compiled)
    assert not any("_orig_mod" in name for name in parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    sparseft.save_adapter(compiled, tmp_path / "adapter")
    loaded = sparseft.load_adapter(make_model("llama"), tmp_path / "adapter")
    assert sparseft.trainable_parameters(loaded).keys() == parameters.keys()
    sparseft.set_adapter(compiled, None)
    plain = sparseft.detach(compiled)
    base = make_model("llama")
    assert type(plain) is type(base) and plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora"])
def test_layers_that_differ_in_their_heads(tmp_path: Path, method: str) -> None:
    """Gemma 4's config refuses to name one width of heads for all layers."""

    def build() -> Any:
        torch.manual_seed(0)
        config = transformers.Gemma4TextConfig(
            vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=80, head_dim=12, global_head_dim=24, layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=96, pad_token_id=0,
        )  # fmt: skip
        return transformers.Gemma4ForCausalLM(config).eval()

    config = {
        "s2ft": sparseft.S2FTConfig(q_ratio=0.25, o_ratio=0.25, importance="random"),
        "sylva": sparseft.SylvaConfig(block_size=8, importance="random"),
        "lora": sparseft.LoraConfig(rank=2, dropout=0.0),
    }[method]
    model, ids = build(), torch.arange(3, 20)[None]
    base = model(input_ids=ids).logits
    model = sparseft.attach(model, config)
    if method == "s2ft":  # a head of four, whole
        trained = {name: p for name, layer in sparse_layers(model).items() for p in layer.patterns.values()}
        assert {name[13:]: len(p.index) for name, p in trained.items()} == {
            "0.self_attn.q_proj": 12, "0.self_attn.o_proj": 12, "1.self_attn.q_proj": 24, "1.self_attn.o_proj": 24
        }  # fmt: skip
    optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.5)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    expected = model(input_ids=ids).logits
    assert not torch.allclose(expected, base)
    loaded = sparseft.load_adapter(build(), sparseft.save_adapter(model, tmp_path / "adapter"))
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(sparseft.merge(loaded)(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_selection_is_not_changed_by_attaching(make_model: Make) -> None:
    selection = Selection({UP: {"blocks": [[0, 0]]}})
    sparseft.attach(make_model("llama"), sparseft.SylvaConfig(block_size=16), selection)
    assert selection.block_size is None


# ---- several adapters ----


def two_adapters(make_model: Make, tmp_path: Path, first: dict, second: dict, sizes: tuple[int, int] = (32, 32)) -> Any:
    """A model with adapters `a` and `b`, `b` active, saved in folders of those names."""
    for name, modules, size, seed in (("a", first, sizes[0], 1), ("b", second, sizes[1], 2)):
        sparseft.save_adapter(attached(make_model("llama"), modules, seed, size), tmp_path / name)
    model = sparseft.load_adapter(make_model("llama"), tmp_path / "a", "a")
    return sparseft.load_adapter(model, tmp_path / "b", "b")


OTHER = {DOWN: {"columns": [0, 8], "blocks": [[1, 2], [0, 0]]}, Q: {"rows": [5, 71]}}  # overlaps OWN in every way


def test_two_adapters_with_different_modules(make_model: Make, tmp_path: Path) -> None:
    base = logits(make_model("llama"))
    model = two_adapters(make_model, tmp_path, OWN, OTHER)
    alone = {n: logits(sparseft.load_adapter(make_model("llama"), tmp_path / n)) for n in ("a", "b")}
    assert torch.equal(logits(model), alone["b"]) and not torch.equal(alone["a"], alone["b"])
    for name in ("a", None, "b", "a", "b", None, "a"):
        sparseft.set_adapter(model, name)
        assert torch.equal(logits(model), base if name is None else alone[name])
        modules = {n.rsplit(".", 2)[0] for n in sparseft.trainable_parameters(model)}
        assert modules == ({} if name is None else {"a": OWN, "b": OTHER}[name]).keys()
    with pytest.raises(UserError, match="no adapter is called 'c'"):
        sparseft.set_adapter(model, "c")
    assert torch.equal(logits(model), alone["a"])
    # training one leaves the other alone
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), alone["a"])
    sparseft.set_adapter(model, "b")
    assert torch.equal(logits(model), alone["b"])
    plain = sparseft.detach(model)
    assert torch.equal(logits(plain), base) and {type(m) for m in plain.modules()} == {
        type(m) for m in make_model("llama").modules()
    }


def test_loading_over_a_name(make_model: Make, tmp_path: Path) -> None:
    model = two_adapters(make_model, tmp_path, OWN, OTHER)
    alone = {n: logits(sparseft.load_adapter(make_model("llama"), tmp_path / n)) for n in ("a", "b")}
    held = list(sparseft.trainable_parameters(model).values())
    sparseft.load_adapter(model, tmp_path / "b", "b")  # the same entries: an optimizer's parameters stay
    assert all(a is b for a, b in zip(sparseft.trainable_parameters(model).values(), held, strict=True))
    sparseft.load_adapter(model, tmp_path / "a", "b")
    assert torch.equal(logits(model), alone["a"])
    sparseft.load_adapter(model, tmp_path / "b", "a")
    assert torch.equal(logits(model), alone["b"])
    sparseft.detach(model)
    assert torch.equal(logits(model), logits(make_model("llama")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(32, 32), (32, 8), (8, 48)])
def test_fuse_is_the_dense_sum(make_model: Make, tmp_path: Path, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    blocks = {UP: {"blocks": [[1, 0], [0, 0]], "rows": [79]}} | OTHER
    for name, modules, size, seed in (("a", OWN, sizes[0], 1), ("b", blocks, sizes[1], 2)):
        modules = dict(modules)
        if sizes[1] == 48 and name == "b":
            modules[DOWN] = {"columns": [0, 8], "blocks": [[0, 1], [0, 0]]}
        sparseft.save_adapter(attached(make_model("llama", dtype), modules, seed, size), tmp_path / name)
    model = sparseft.load_adapter(make_model("llama", dtype), tmp_path / "a", "a")
    sparseft.load_adapter(model, tmp_path / "b", "b")
    weights = {"a": 0.7, "b": -1.5}
    sparseft.fuse(model, weights, "sum")
    base = make_model("llama", dtype)
    spec = ModelSpec.of(base)
    for module in spec.linears:
        found, expected = model.get_submodule(module).weight.detach(), base.get_submodule(module).weight.detach()
        if module in SHAPES:
            total = expected.float() + sum(w * dense_delta(tmp_path / n, module) for n, w in weights.items())
            if dtype == torch.float32:
                torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-6)
            else:  # rounded once: at most where the fp32 sum lies at a tie may one step differ
                assert (found != total.bfloat16()).float().mean() < 1e-3
                torch.testing.assert_close(found.float(), total, rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(found, expected)
    fused = logits(model)
    folder = sparseft.save_adapter(model, tmp_path / "sum")
    assert torch.equal(logits(sparseft.load_adapter(make_model("llama", dtype), folder)), fused)
    config = json.loads((folder / CONFIG).read_text())
    assert config["method_config"] == {"fused": weights}
    sparseft.set_adapter(model, "a")
    assert torch.equal(logits(model), logits(sparseft.load_adapter(make_model("llama", dtype), tmp_path / "a")))
    sparseft.fuse(model, {"a": 1.0}, "sum")  # over the old one
    torch.testing.assert_close(
        logits(model).float(), logits(sparseft.set_adapter(model, "a")).float(), rtol=1e-5, atol=1e-5
    )
    sparseft.fuse(model, {"a": 0.0, "b": 0.0}, "zero")
    assert torch.equal(logits(model), logits(base))
    sparseft.detach(model)
    assert torch.equal(logits(model), logits(base))


def test_fuse_refuses(make_model: Make, tmp_path: Path) -> None:
    model = two_adapters(make_model, tmp_path, OWN, OTHER)
    before = logits(model)
    for weights, message in (
        ({}, "name at least one"),
        ({"a": 1.0, "bb": 1.0}, "no adapter is called 'bb'"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": float("inf")}, "finite"),
        ({"a": "1"}, "the weight of 'a' is '1': expected a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            sparseft.fuse(model, weights)
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="no adapter"):
        sparseft.fuse(make_model("llama"), {"a": 1.0})


def test_split_blocks_keeps_every_entry() -> None:
    torch.manual_seed(0)
    value = SparseDelta(torch.tensor([[0, 1], [1, 0]]), torch.randn(2, 6, 6), 6)
    parts = split_blocks(value, 2, (9, 10))
    dense, cut = torch.zeros(12, 12), torch.zeros(12, 12)
    dense[0:6, 6:12], dense[6:12, 0:6] = value.delta[0], value.delta[1]
    for (r, c), part in zip(parts.index.tolist(), parts.delta, strict=True):
        cut[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = part
    assert torch.equal(dense[:9, :10], cut[:9, :10])
    assert all(r * 2 < 9 and c * 2 < 10 for r, c in parts.index.tolist())


def test_unite_of_one_is_itself_sorted() -> None:
    value = SparseDelta(torch.tensor([4, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    rows = unite([(2.0, {"rows": value})], (5, 2))["rows"]
    assert rows.index.tolist() == [1, 4] and rows.delta.tolist() == [[6.0, 8.0], [2.0, 4.0]]
    columns = unite([(1.0, {"columns": value}), (1.0, {"columns": value})], (2, 5))["columns"]
    assert columns.index.tolist() == [1, 4] and columns.delta.tolist() == [[4.0, 2.0], [8.0, 6.0]]


# ---- peft ----


@torch.no_grad()
def randomise_lora(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_folder(model: Any, folder: Path, seed: int = 0, **options: Any) -> Tensor:
    """A folder made by plain peft, without anything of ours; returns its logits."""
    import peft

    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    wrapped = randomise_lora(peft.get_peft_model(model, peft.LoraConfig(**options)), seed).eval()
    wrapped.save_pretrained(folder)
    return logits(wrapped)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.5}]
)
def test_a_folder_made_by_plain_peft_loads(make_model: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_folder(make_model("llama"), tmp_path / "p", **options)
    base = logits(make_model("llama"))
    model = sparseft.load_adapter(make_model("llama"), tmp_path / "p")
    assert torch.equal(logits(model), expected)  # dropout off: the model was in evaluation mode
    assert set(sparseft.trainable_parameters(model)) == {n for n, _ in model.named_parameters() if "lora_" in n}
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), base)
    sparseft.set_adapter(model, "default")
    sparseft.save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(sparseft.load_adapter(make_model("llama"), tmp_path / "again")), expected)
    assert torch.equal(logits(sparseft.detach(model)), base)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("config", [sparseft.LoraConfig(rank=3), sparseft.DoraConfig(rank=3)], ids=["lora", "dora"])
def test_a_saved_lora_loads_in_plain_peft(make_model: Make, tmp_path: Path, kind: str, config: Any) -> None:
    import peft

    model = randomise_lora(sparseft.attach(make_model(kind), config))
    folder = sparseft.save_adapter(model, tmp_path / "a")
    assert {CONFIG, TENSORS} <= {p.name for p in folder.iterdir()}
    own = json.loads((folder / CONFIG).read_text())["sparseft"]
    assert own["method"] == ("dora" if config.use_dora else "lora") and own["method_config"]["rank"] == 3
    assert own["base_fingerprint"] == base_fingerprint(make_model(kind))
    with pytest.warns(UserWarning, match="sparseft"):  # peft says what it passes over
        plain = peft.PeftModel.from_pretrained(make_model(kind), str(folder))
    assert torch.equal(logits(plain.eval()), logits(model))


@pytest.mark.filterwarnings("ignore:.*was active which is now deleted")
def test_several_lora_adapters(make_model: Make, tmp_path: Path) -> None:
    expected = {
        "math": peft_folder(make_model("llama"), tmp_path / "math", 1),
        "chat": peft_folder(make_model("llama"), tmp_path / "chat", 2, r=2, target_modules=["up_proj"]),
    }
    model = sparseft.load_adapter(make_model("llama"), tmp_path / "math", "math")
    sparseft.load_adapter(model, tmp_path / "chat", "chat")
    assert torch.equal(logits(model), expected["chat"])
    for name in ("math", "chat", "math"):
        assert torch.equal(logits(sparseft.set_adapter(model, name)), expected[name])
    sparseft.save_adapter(model, tmp_path / "chat2", "chat")
    assert torch.equal(logits(sparseft.load_adapter(make_model("llama"), tmp_path / "chat2")), expected["chat"])
    sparseft.load_adapter(model, tmp_path / "chat", "math")  # over the name
    assert torch.equal(logits(model), expected["chat"])
    with pytest.raises(UserError, match="no adapter is called 'c'"):
        sparseft.set_adapter(model, "c")


@pytest.mark.filterwarnings("ignore:.*was active which is now deleted")
def test_each_of_several_lora_adapters_keeps_its_description(make_model: Make, tmp_path: Path) -> None:
    configs = {"math": sparseft.LoraConfig(rank=3), "chat": sparseft.DoraConfig(rank=2)}
    for name, config in configs.items():
        sparseft.save_adapter(sparseft.attach(make_model("llama"), config), tmp_path / name)
    model = sparseft.load_adapter(make_model("llama"), tmp_path / "math", "math")
    sparseft.load_adapter(model, tmp_path / "chat", "chat")

    def described(folder: Path) -> tuple[str, dict[str, Any]]:
        own = json.loads((folder / CONFIG).read_text())["sparseft"]
        return own["method"], own["method_config"]

    for name in configs:
        again = sparseft.save_adapter(model, tmp_path / f"{name}-again", name)
        assert described(again) == described(tmp_path / name)
    fused = sparseft.save_adapter(sparseft.fuse(model, {"math": 0.5}), tmp_path / "fused")
    assert described(fused) == ("lora", {"fused": {"math": 0.5}})


@pytest.mark.filterwarnings("ignore:.*was active which is now deleted")
@pytest.mark.parametrize("rslora", [False, True])
def test_fusing_lora_is_the_dense_sum(make_model: Make, tmp_path: Path, rslora: bool) -> None:
    peft_folder(make_model("llama"), tmp_path / "math", 1, use_rslora=rslora, lora_alpha=5, lora_dropout=0.3)
    peft_folder(make_model("llama"), tmp_path / "chat", 2, r=2, target_modules=["up_proj", "q_proj"])
    model = sparseft.load_adapter(make_model("llama"), tmp_path / "math", "math")
    sparseft.load_adapter(model, tmp_path / "chat", "chat")
    base = make_model("llama")
    merged = {n: sparseft.merge(sparseft.load_adapter(make_model("llama"), tmp_path / n)) for n in ("math", "chat")}
    for weights in ({"math": 0.5, "chat": 2.0}, {"math": -1.0, "chat": 0.25}):  # the second over the first
        sparseft.fuse(model, weights)
        expected = make_model("llama")
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                start = base.get_parameter(name)
                parameter.copy_(start + sum(w * (merged[n].get_parameter(name) - start) for n, w in weights.items()))
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
        sparseft.save_adapter(model, tmp_path / "fused")
        again = sparseft.load_adapter(make_model("llama"), tmp_path / "fused")
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="cannot be made of itself"):
        sparseft.fuse(model, {"fused": 1.0})
    dora = sparseft.attach(make_model("llama"), sparseft.DoraConfig(rank=2))
    with pytest.raises(UserError, match="magnitudes do not add up"):
        sparseft.fuse(dora, {"default": 1.0})


PEFT_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "no tensors": lambda f: (f / TENSORS).unlink(),
    "tensor missing": lambda f: change_tensors(f, lambda t: t.pop(sorted(t)[0])),
    "tensor renamed": lambda f: change_tensors(
        f, lambda t: t.update({"base_model.model.x.lora_A.weight": t.pop(sorted(t)[0])})
    ),
    "extra tensor": lambda f: change_tensors(
        f, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)})
    ),
    "other shape": lambda f: change_tensors(f, lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]][:, 1:]})),
    "other rank": lambda f: edit(f, r=9),
    "other targets": lambda f: edit(f, target_modules=["nothing_proj"]),
    "other kind": lambda f: edit(f, peft_type="IA3"),
    "unknown kind": lambda f: edit(f, peft_type="XYZ"),
}


@pytest.mark.parametrize("case", list(PEFT_DAMAGE))
@pytest.mark.filterwarnings("ignore")
def test_damaged_peft_folders_are_refused(make_model: Make, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "p"
    peft_folder(make_model("llama"), folder)
    shutil.copytree(folder, tmp_path / "good")
    PEFT_DAMAGE[case](folder)
    plain = make_model("llama")
    plain.lm_head.requires_grad_(False)
    before = state(plain)
    with pytest.raises(UserError, match=str(folder)) as refusal:
        sparseft.load_adapter(plain, folder)
    assert case != "other shape" or "size mismatch for " in str(refusal.value)  # says which
    assert_same_state(before, plain)
    model = sparseft.load_adapter(plain, tmp_path / "good", "kept")
    expected, names = logits(model), set(model.state_dict())
    for name in ("kept", "other"):
        with pytest.raises(UserError, match=str(folder)):
            sparseft.load_adapter(model, folder, name)
        assert torch.equal(logits(model), expected) and set(model.state_dict()) == names
        assert list(model.peft_config) == ["kept"]
    assert torch.equal(logits(sparseft.detach(model)), before["logits"])


def test_kinds_of_adapters_do_not_mix(make_model: Make, good: Path, tmp_path: Path) -> None:
    peft_folder(make_model("llama"), tmp_path / "p")
    sparse = attached(make_model("llama"))
    with pytest.raises(UserError, match="with sparse layers"):
        sparseft.load_adapter(sparse, tmp_path / "p")
    lora = sparseft.attach(make_model("llama"), sparseft.LoraConfig(rank=2))
    with pytest.raises(UserError, match="with lora attached"):
        sparseft.load_adapter(lora, good)
    full = sparseft.attach(make_model("llama"), sparseft.FullConfig())
    for folder in (good, tmp_path / "p"):
        with pytest.raises(UserError, match="with full attached"):
            sparseft.load_adapter(full, folder)
    saved = sparseft.save_adapter(lora, tmp_path / "lora")
    other = make_model("llama", seed=1)
    before = state(other)
    with pytest.raises(UserError, match="another base"):
        sparseft.load_adapter(other, saved)
    assert_same_state(before, other)


def test_lora_sizes(make_model: Make) -> None:
    """The rank from sparsity is the one with the nearest parameter count; targets and scope choose the modules."""
    model = make_model("llama")
    linears = ModelSpec.of(model).linears
    scope, per_rank = sum(r * c for r, c in linears.values()), sum(r + c for r, c in linears.values())
    lora = sparseft.attach(model, sparseft.LoraConfig(sparsity=0.8))
    count = sum(p.numel() for p in sparseft.trainable_parameters(lora).values())
    assert count % per_rank == 0 and abs(count - 0.2 * scope) <= per_rank / 2
    assert trainable_count(lora) == count
    narrow = sparseft.attach(make_model("llama"), sparseft.LoraConfig(rank=2, scope="layers.1", targets=["v_proj"]))
    assert {n.split(".lora_")[0] for n in sparseft.trainable_parameters(narrow)} == {
        "base_model.model.model.layers.1.self_attn.v_proj"
    }
    with pytest.raises(UserError, match="called 'vproj'. Did you mean 'v_proj'"):
        sparseft.attach(make_model("llama"), sparseft.LoraConfig(rank=2, targets=["vproj"]))
    again = sparseft.attach(make_model("llama"), sparseft.LoraConfig(sparsity=0.8))
    for a, b in zip(lora.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # seeded
    assert isinstance(lora, nn.Module)


def test_a_lora_on_names_that_transformers_would_rename_loads_again(tmp_path: Path) -> None:
    """Its pattern for the shared expert of Laguna's checkpoints matches the model's own name of it as well."""
    config = transformers.LagunaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config)
    saved = sparseft.attach(copy.deepcopy(base), sparseft.LoraConfig(rank=2, scope="shared_experts"))
    sparseft.save_adapter(saved, tmp_path / "lora")
    loaded = sparseft.load_adapter(base, tmp_path / "lora")
    left, right = sparseft.trainable_parameters(saved), sparseft.trainable_parameters(loaded)
    assert left.keys() == right.keys() and any("shared_experts" in name for name in left)
    assert all(torch.equal(value, right[name]) for name, value in left.items())
