"""`--format merged`: a model folder that transformers loads, the base's to the bit but for what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparseft
from sparseft.config import ModelConfig
from sparseft.export.formats import merged as format_file
from sparseft.export.formats.merged import Merged, shards
from sparseft.files.hashing import file_hash
from sparseft.files.tensors import Stored
from sparseft.models.checkpoint import fetch_beside
from sparseft.publish.listing import listing_of
from support import adapted
from support.models import build_tokenizer
from support.running import refused
from support.running import sparseft as run

CASES = [
    *(("llama", method) for method in ("columns", "fused", "dora", "full")),
    ("qwen2", "blocks"),
    *(("gpt2", method) for method in ("rows", "lora")),
    ("phi3", "rows"),
    *(("mixtral", method) for method in ("fused", "full")),
]


def checkpoint(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def wanted(kind: str, method: str, base: Path, adapter: Path) -> Any:
    if method == "full":
        return adapted.load(adapter, torch.bfloat16)
    return sparseft.merge(sparseft.load_adapter(adapted.load(base), adapter))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = adapted.base(kind, tmp_path_factory.mktemp(kind) / "base", torch.bfloat16, shard="70KB")
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_folder_is_the_merged_model(
    kind: str, method: str, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_file, "SHARD", 60_000)
    base = bases(kind)
    adapter = adapted.adapter(kind, method, base, tmp_path / "adapter")
    if method == "full":
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    result = run(tmp_path, "export", adapter, "--format", "merged", "--out", "out", "--json").json
    out, model = tmp_path / "out", wanted(kind, method, base, adapter)
    found = adapted.load(out)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    assert found.dtype == torch.bfloat16
    assert result["files"] == len(list(out.glob("model-*.safetensors"))) > 1
    before, after = checkpoint(base), checkpoint(out)
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed if method == "full" else 0 < len(changed) < len(before) / 2
    for name in ("generation_config.json", *(() if method == "full" else ("tokenizer.json", "tokenizer_config.json"))):
        assert file_hash(out / name) == file_hash(base / name)
    assert transformers.AutoTokenizer.from_pretrained(out)("true")["input_ids"]
    assert not (out / "sparseft_config.json").exists()


@pytest.mark.parametrize("method", ["fused", "lora"])
@pytest.mark.parametrize(
    ("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
def test_in_another_dtype(method: str, stored: str, asked: str, tmp_path: Path) -> None:
    """base + delta in the wider dtype, rounded once."""
    base = adapted.base("llama", tmp_path / "base", getattr(torch, stored))
    adapter = adapted.adapter("llama", method, base, tmp_path / "adapter")
    run(tmp_path, "export", adapter, "--format", "merged", "--out", "out", "--dtype", asked)
    wide = sparseft.merge(sparseft.load_adapter(adapted.load(base, torch.float32), adapter)).state_dict()
    found = adapted.load(tmp_path / "out")
    assert found.dtype == getattr(torch, asked)
    assert all(torch.equal(value, wide[name].to(found.dtype)) for name, value in found.state_dict().items())


def test_tensors_that_the_checkpoint_keeps_wider_stay_so(tmp_path: Path) -> None:
    """A checkpoint of mixed dtypes: what the adapter does not change is copied, whatever the model is loaded in."""
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.randn(tensors[name].shape) * 0.1 + 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for method in ("rows", "lora"):
        adapter = adapted.adapter("llama", method, base, tmp_path / method)
        run(tmp_path, "export", adapter, "--format", "merged", "--out", f"out-{method}")
        after = checkpoint(tmp_path / f"out-{method}")
        assert all(torch.equal(after[name], tensors[name]) for name in tensors if "norm" in name)
        assert all(after[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [(), ("--dtype", "float32")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_whole_model_trained_in_another_dtype_than_its_checkpoint(
    stored: torch.dtype, dtype: tuple[str, ...], tmp_path: Path
) -> None:
    """What was trained is the narrow model: a value that training left alone is what that has, not the base's own."""
    base = adapted.base("llama", tmp_path / "base", stored)
    model = sparseft.attach(adapted.load(base, torch.bfloat16), sparseft.FullConfig(dtype="model"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] += 0.5
    sparseft.save_adapter(model, tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    run(tmp_path, "export", "adapter", "--format", "merged", "--out", "out", *dtype)
    found = adapted.load(tmp_path / "out", torch.float32).state_dict()
    trained = adapted.load(tmp_path / "adapter", torch.float32).state_dict()
    wanted = {name: value.to(torch.float32 if dtype else stored).float() for name, value in trained.items()}
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    if not dtype:
        run(tmp_path, "export", "adapter", "--format", "patch", "--out", "patch")
        patched = adapted.load(base)
        sparseft.apply_patch(patched, tmp_path / "patch")
        assert all(torch.equal(value.float(), wanted[name]) for name, value in patched.state_dict().items())


def test_a_head_that_was_untied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA on the head of a tied pair: the folder has both, and the config says that they are two."""
    import peft

    base = adapted.base("gpt2", tmp_path / "base", torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(adapted.load(base), config).save_pretrained(tmp_path / "adapter")
    words = ("export", tmp_path / "adapter", f"model.path={base}")
    run(tmp_path, *words, "--format", "merged", "--out", "out")
    model, found = wanted("gpt2", "lora", base, tmp_path / "adapter"), adapted.load(tmp_path / "out")
    assert found.config.tie_word_embeddings is False
    assert not torch.equal(found.lm_head.weight, found.transformer.wte.weight)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(found.transformer.wte.weight, adapted.load(base).transformer.wte.weight)
    write = Merged.write

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][7, 3] *= 1.01
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return facts

    monkeypatch.setattr(Merged, "write", damaged)
    done = run(tmp_path, *words, "--format", "merged", "--out", "wrong", code=1)
    assert "1 of the" in done.err and "lm_head.weight" in done.err and not (tmp_path / "wrong").exists()
    said = refused(tmp_path, *words, "--format", "patch", "--out", "patch")
    assert "which the base ties to its embeddings" in said and "use --format merged" in said


def test_what_makes_the_base_work_comes_along(tmp_path: Path) -> None:
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "merges.txt").write_text("a b")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "modeling_own.py").write_text("raise SystemExit")
    (base / "README.md").write_text("the base's card")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    config = json.loads((base / "config.json").read_text())
    more = {"own": 7, "time_step_limit": [0.0, float("inf")]}  # as transformers writes it, though no strict JSON
    auto_map = {"auto_map": {"AutoConfig": "modeling_own.C"}}
    (base / "config.json").write_text(json.dumps(config | auto_map | more))
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    for _ in range(2):  # it may be replaced, with its folder of templates
        run(tmp_path, "export", adapter, "--format", "merged", "--out", "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert "additional_chat_templates/tool.jinja" in {
        file.name for file in listing_of(str(tmp_path / "out"), "me/mine", base="me/base").files
    }
    assert {"chat_template.jinja", "merges.txt", "additional_chat_templates/tool.jinja"} <= names
    assert not names & {"modeling_own.py", "pytorch_model.bin.index.json"}
    assert "the base's card" not in (tmp_path / "out/README.md").read_text()  # it has a card of its own
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {key: value for key, value in config.items() if key != "auto_map"} | more


def test_only_what_is_part_of_a_model_comes_along(tmp_path: Path) -> None:
    """Whatever else lies beside the base is the user's own: the export is published as it is."""
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    own = ("trainer_state.json", "train.json", "notes.txt", "secrets.json", "requirements.txt")
    parts = ("preprocessor_config.json", "processor_config.json", "chat_template.json", "vocab.txt", "LICENSE")
    for name in (*own, *parts):
        (base / name).write_text("{}")
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    run(tmp_path, "export", adapter, "--format", "merged", "--out", "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", *parts} <= names and not names & set(own)


@pytest.mark.parametrize("link", ["tokenizer.key", "LICENSE.txt", "additional_chat_templates/own.jinja"])
def test_a_link_out_of_the_base_is_not_followed(link: str, tmp_path: Path) -> None:
    """An export is published as it is: `tokenizer.key -> ~/.ssh/id_rsa` is nobody's tokenizer."""
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    (tmp_path / "id_rsa").write_text("mine alone")
    (base / link).parent.mkdir(exist_ok=True)
    (base / link).symlink_to(tmp_path / "id_rsa")
    said = refused(tmp_path, "export", adapter, "--format", "merged", "--out", "out")
    assert f"base/{link} is a link that leads out of its folder" in said and not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_its_own_files(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--base/snapshots/abc"
    base = adapted.base("llama", snapshot, torch.bfloat16)
    for file in list(base.iterdir()):
        blob = tmp_path / "models--me--base/blobs" / file.name
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(f"../../blobs/{file.name}")
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    run(tmp_path, "export", adapter, "--format", "merged", "--out", "out")
    assert (tmp_path / "out/tokenizer.json").is_file() and not (tmp_path / "out/tokenizer.json").is_symlink()


def test_where_the_base_came_from_is_left_out(tmp_path: Path) -> None:
    """Older files name the folder that they were loaded from."""
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(content | {key: "/home/alice/acme"}))
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    run(tmp_path, "export", adapter, "--format", "merged", "--out", "out")
    for name in ("config.json", "tokenizer_config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "alice" not in text and "name_or_path" not in json.loads(text)


def another_tokenizer(folder: Path) -> Path:
    """One that ends a turn otherwise than the bases'."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["rows", "full"])
def test_a_tokenizer_of_its_own_is_not_mixed_with_the_bases(method: str, tmp_path: Path) -> None:
    """Of the base's tokenizer no file stays that the other one does not write: transformers would read it too."""
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (base / "added_tokens.json").write_text(json.dumps({"</s>": 2}))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "tokenizer.model").write_text("")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    adapter = adapted.adapter("llama", method, base, tmp_path / "adapter")
    own = another_tokenizer(adapter if method == "full" else tmp_path / "own")
    words = () if method == "full" else (f"model.tokenizer={own}",)
    run(tmp_path, "export", adapter, "--format", "merged", "--out", "out", *words)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.eos_token, found.pad_token, found.chat_template) == ("<s>", "<s>", None)


def test_a_tokenizer_that_comes_back_otherwise_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = adapted.base("llama", tmp_path / "base", torch.bfloat16)
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")
    write = Merged.write

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        another_tokenizer(folder)
        return facts

    monkeypatch.setattr(Merged, "write", damaged)
    done = run(tmp_path, "export", adapter, "--format", "merged", "--out", "out", code=1)
    assert "tokenizer" in done.err and "eos_token" in done.err and not (tmp_path / "out").exists()


def test_what_the_hub_has_beside_a_checkpoint_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing before has asked for: how a model generates, and how it reads images and sound. Of a folder it is
    there or it is not."""
    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        "transformers.utils.hub.cached_file", lambda path, name, revision, **_: asked.append((path, name, revision))
    )
    (tmp_path / "config.json").write_text("{}")
    fetch_beside(ModelConfig(path=str(tmp_path)))
    fetch_beside(ModelConfig(path="someone/model", revision="v2"))
    names = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json")
    assert set(asked) >= {("someone/model", name, "v2") for name in names}


def test_files_are_cut_at_the_limit() -> None:
    tensors = {name: Stored(torch.float32, (10,)) for name in "abcde"} | {"large": Stored(torch.bfloat16, (500,))}
    cut = shards(tensors, 100)
    assert list(cut.values()) == [["a", "b"], ["c", "d"], ["e"], ["large"]]
    assert list(cut)[0] == "model-00001-of-00004.safetensors"
    assert list(shards(tensors, 10**6)) == ["model.safetensors"]


# -- faults that the export must see ----------------------------------------------------------------------------------


def one_value(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.v_proj.weight"][7, 3] *= 1.01


def one_value_that_did_not_train(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] *= 1.01


def the_base(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.v_proj.weight"] = BASE["model.layers.0.self_attn.v_proj.weight"].clone()


def a_tensor_less(folder: Path, tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def another_dtype(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def another_config(folder: Path, tensors: dict[str, Tensor]) -> None:
    """All values right, and a model that computes something else of them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


BASE: dict[str, Tensor] = {}


@pytest.mark.parametrize(
    "fault", [one_value, one_value_that_did_not_train, the_base, a_tensor_less, another_dtype, another_config]
)
def test_a_fault_put_in_on_purpose_is_seen(
    fault: Any, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, write = bases("llama"), Merged.write
    BASE.update(checkpoint(base))
    adapter = adapted.adapter("llama", "rows", base, tmp_path / "adapter")

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        tensors = load_file(folder / "model.safetensors")
        fault(folder, tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return facts

    monkeypatch.setattr(Merged, "write", damaged)
    done = run(tmp_path, "export", adapter, "--format", "merged", "--out", "out", code=1)
    assert "Nothing was kept" in done.err
    assert done.err.count("error:") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("format", ["merged", "patch", "mlx"])
def test_differences_that_nearly_cancel_where_several_meet(format: str, tmp_path: Path) -> None:
    """Sums in another order then differ by far more than the last bit of what is left."""
    base = adapted.base("llama", tmp_path / "base", torch.float32)
    model, module = adapted.load(base), "model.layers.0.self_attn.o_proj"
    selection = sparseft.Selection({module: {"rows": [0, 1, 2, 3], "columns": list(range(40))}})
    model = sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9), selection)
    layer = model.get_submodule(module)
    with torch.no_grad():
        rows, columns = layer.patterns["rows"].delta, layer.patterns["columns"].delta
        rows.normal_(generator=torch.Generator().manual_seed(0))
        columns[:4] = 0.01 - rows[:, :40]
        layer.write_back()
    sparseft.save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    run(tmp_path, "export", tmp_path / "adapter", "--format", format, "--out", out, f"model.path={base}")
    written = {"merged": "model.safetensors", "mlx": "adapters.safetensors"}
    if format in written:
        name = f"{module}.weight"
        assert torch.equal(load_file(out / written[format])[name], sparseft.merge(model).state_dict()[name])
