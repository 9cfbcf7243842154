"""`--format patch` and `sparseft.apply_patch`: the merged weights from a few numbers, and the base's again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.export.formats.patch import PatchFormat
from sparseft.files.hashing import BODY, body_hash, file_hash
from sparseft.layers import sparse_layers
from sparseft.publish.listing import listing_of
from support import adapted
from support.places import ROOT
from support.running import refused
from support.running import sparseft as run

CASES = [
    *(("llama", method) for method in ("rows", "fused", "lora", "full")),
    ("qwen2", "columns"),
    *(("gpt2", method) for method in ("rows", "blocks", "dora")),
    ("phi3", "blocks"),
    *(("mixtral", method) for method in ("rows", "fused", "lora")),
]


class Case:
    """A base, an adapter on it, and its patch."""

    def __init__(self, folder: Path, kind: str, method: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.kind, self.method = kind, method
        self.base = adapted.base(kind, folder / "base", dtype, shard="70KB")
        self.adapter = adapted.adapter(kind, method, self.base, folder / "adapter")
        self.patch = folder / "patch"
        self.result = run(folder, "export", self.adapter, "--format", "patch", "--out", self.patch, "--json").json

    @property
    def merged(self) -> Any:
        if self.method == "full":
            return adapted.load(self.adapter, torch.bfloat16)
        return sparseft.merge(sparseft.load_adapter(adapted.load(self.base), self.adapter))

    @property
    def described(self) -> dict[str, Any]:
        return json.loads((self.patch / "patch.json").read_text())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    made: dict[tuple[str, str], Case] = {}

    def get(kind: str, method: str) -> Case:
        if (kind, method) not in made:
            made[kind, method] = Case(tmp_path_factory.mktemp("case"), kind, method)
        return made[kind, method]

    return get


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, as its files hold them."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit, in the same dtypes."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(tensor.view(whole), other[name].view(whole)), name


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_model_patched_is_the_merged_one_and_the_base_again(case: Any, kind: str, method: str) -> None:
    it = case(kind, method)
    model = adapted.load(it.base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = sparseft.apply_patch(model, it.patch)
    same(model.state_dict(), it.merged.state_dict())
    sparseft.apply_patch(model, it.patch)  # new values, no differences
    same(model.state_dict(), it.merged.state_dict())
    redo = sparseft.apply_patch(model, undo)
    same(model.state_dict(), before)
    sparseft.apply_patch(model, redo)
    same(model.state_dict(), it.merged.state_dict())


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_files_are_what_the_contract_says(case: Any, kind: str, method: str) -> None:
    """By a few lines of plain code, on the checkpoint's own tensors; held against what transformers saves."""
    it = case(kind, method)
    tensors, described = load_file(it.patch / "patch.safetensors"), it.described
    base = checkpoint(it.base)
    assert file_hash(it.patch / "patch.safetensors") == described["sha256"]
    assert {name.rpartition(".")[0] for name in tensors} == described["tensors"].keys()
    patched = {name: tensor.clone() for name, tensor in base.items()}
    for name, facts in described["tensors"].items():
        index, values = tensors[f"{name}.indices"], tensors[f"{name}.values"]
        assert index.dtype == torch.int32
        assert torch.equal(index, index.unique())
        assert (list(base[name].shape), len(index)) == (facts["shape"], facts["count"])
        assert values.dtype == base[name].dtype == getattr(torch, facts["dtype"])
        patched[name].view(-1)[index.long()] = values
    it.merged.save_pretrained(it.base.parent / "saved")
    same(patched, checkpoint(it.base.parent / "saved"))
    assert described["method"] == (method if method in ("lora", "dora", "full") else "sylva")
    assert described["base_model"] == str(it.base)
    assert len(described["base_fingerprint"]) == 64


def test_a_base_in_torchs_files_is_given_as_it_was_saved_anew(case: Any, tmp_path: Path) -> None:
    it = case("llama", "rows")
    shutil.copytree(it.base, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(checkpoint(it.base), tmp_path / "old" / "pytorch_model.bin")
    adapter = adapted.adapter("llama", "rows", tmp_path / "old", tmp_path / "adapter")
    words = ["export", str(adapter), "--format", "patch", "--out", "patch"]
    message = refused(tmp_path, *words)
    assert message.endswith("save both with save_pretrained, and give that as model.path=FOLDER.")
    adapted.load(tmp_path / "old").save_pretrained(tmp_path / "anew")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "anew")
    run(tmp_path, *words, "model.path=anew")
    same(load_file(tmp_path / "patch" / "patch.safetensors"), load_file(it.patch / "patch.safetensors"))


@pytest.mark.parametrize(
    ("kind", "method"), [pair for pair in CASES if pair[1] in ("rows", "columns", "blocks", "fused")]
)
def test_of_a_sparse_adapter_exactly_its_entries(case: Any, kind: str, method: str) -> None:
    it = case(kind, method)
    model = adapted.attached(kind, method, adapted.load(it.base))
    count = 0
    for layer in sparse_layers(model).values():
        touched = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
        for pattern in layer.patterns.values():
            for item in pattern.index.tolist():
                if pattern.kind == "rows":
                    touched[item] = True
                elif pattern.kind == "columns":
                    touched[:, item] = True
                else:
                    touched[item[0] * 32 : item[0] * 32 + 32, item[1] * 32 : item[1] * 32 + 32] = True
        count += int(touched.sum())
    assert it.result["entries"] == count == sum(facts["count"] for facts in it.described["tensors"].values())


def test_a_sparse_adapter_needs_no_model_to_be_written(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the proof, at the end, loads one."""
    it, loaded = case("llama", "rows"), []
    monkeypatch.setattr("sparseft.export.changed_tensors.load_model", lambda *_: loaded.append("written") or 1 / 0)
    done = run(it.base.parent, "export", it.adapter, "--format", "patch", "--out", "again", code=None)
    assert loaded == ["written"]  # by the proof: write and verify have passed
    assert "ZeroDivisionError" in done.err
    assert not (it.base.parent / "again").exists()


def test_a_checkpoint_without_the_models_prefix(tmp_path: Path) -> None:
    base = adapted.base("gpt2", tmp_path / "base", torch.bfloat16)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in checkpoint(base).items()}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    adapter = adapted.adapter("gpt2", "rows", base, tmp_path / "adapter")
    run(tmp_path, "export", adapter, "--format", "patch", "--out", "patch")
    names = json.loads((tmp_path / "patch/patch.json").read_text())["tensors"]
    assert names.keys() == {"h.0.attn.c_attn.weight"}
    model, state = adapted.load(base), dict(plain)
    sparseft.apply_patch(model, tmp_path / "patch")
    sparseft.apply_patch(state, tmp_path / "patch")
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, state["h.0.attn.c_attn.weight"])
    same(model.state_dict(), sparseft.merge(sparseft.load_adapter(adapted.load(base), adapter)).state_dict())
    # live patching names them as the model would be saved
    trained = sparseft.load_adapter(adapted.load(base), adapter)
    sparseft.PatchSender(trained, tmp_path / "live").send()
    followed = dict(plain)
    sparseft.PatchReceiver(followed, tmp_path / "live").receive()
    assert all(torch.equal(tensor, state[name]) for name, tensor in followed.items())


def test_a_published_patch_is_applied(case: Any, tmp_path: Path) -> None:
    """Publishing names the base otherwise."""
    it = case("llama", "rows")
    (tmp_path / "got").mkdir()
    for file in listing_of(str(it.patch), "me/mine", base="me/base").files:
        (tmp_path / "got" / file.name).write_bytes(file.content or file.path.read_bytes())
    assert json.loads((tmp_path / "got/patch.json").read_text())["base_model"] == "me/base"
    model = adapted.load(it.base)
    sparseft.apply_patch(model, tmp_path / "got")
    same(model.state_dict(), it.merged.state_dict())


def test_a_patch_that_hashed_the_name_of_its_base_is_read(case: Any, tmp_path: Path) -> None:
    it = case("llama", "rows")
    content = it.described
    del content["sha256"]
    folder = tmp_path / "old"
    folder.mkdir()
    save_file(load_file(it.patch / "patch.safetensors"), folder / "patch.safetensors", {BODY: body_hash(content)})
    content["sha256"] = file_hash(folder / "patch.safetensors")
    (folder / "patch.json").write_text(json.dumps(content))
    sparseft.Patch.load(folder)
    (folder / "patch.json").write_text(json.dumps(content | {"base_model": "another"}))
    with pytest.raises(UserError, match="altered"):
        sparseft.Patch.load(folder)


def test_what_an_export_says_of_itself_is_not_said_of_the_patched_folder(case: Any, tmp_path: Path) -> None:
    """By its note the folder could be replaced, and be published as what it is no more."""
    it = case("llama", "fused")
    base = tmp_path / "base"
    shutil.copytree(it.base, base)
    for name in ("sparseft_export.json", "README.md"):
        (base / name).write_text("{}")
    sparseft.apply_patch(base, it.patch, out=tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in it.base.iterdir()}


def test_home_is_where_a_patch_is_written_too(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = case("llama", "rows")
    monkeypatch.setenv("HOME", str(tmp_path))
    patch = sparseft.Patch.load(it.patch)
    assert patch.save("~/undo") == tmp_path / "undo"
    sparseft.Patch.load("~/undo")
    sparseft.apply_patch(it.base, patch, out="~/patched")
    assert (tmp_path / "patched/config.json").is_file()
    model = sparseft.load_adapter(adapted.load(it.base), it.adapter)
    selection = sparseft.Selection({"model.layers.0.mlp.down_proj": {"columns": torch.tensor([1])}})
    assert selection.save("~/selection") == tmp_path / "selection"
    sparseft.Selection.load("~/selection")
    assert sparseft.save_adapter(model, "~/adapter") == tmp_path / "adapter"
    sparseft.load_adapter(adapted.load(it.base), "~/adapter")


def test_a_read_only_model_folder_is_patched_into_a_writable_one(case: Any, tmp_path: Path) -> None:
    it = case("llama", "rows")
    base = tmp_path / "base"
    shutil.copytree(it.base, base)
    (base / "more").mkdir()
    name = sorted(path.name for path in base.glob("*.safetensors"))[0]
    (base / "more" / name).write_bytes(b"another file of that name")
    (base / "gone").symlink_to(base / "nowhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/text").write_text("behind a link")
    (base / "linked").symlink_to(tmp_path / "elsewhere")
    for folder in (base / "more", base):
        folder.chmod(0o555)
    try:
        sparseft.apply_patch(base, it.patch, out=tmp_path / "out")
    finally:
        base.chmod(0o755)
    assert all(folder.stat().st_mode & 0o200 for folder in (tmp_path / "out", tmp_path / "out/more"))
    assert (tmp_path / "out/linked/text").read_text() == "behind a link"
    assert (tmp_path / "out/more" / name).read_bytes() == b"another file of that name"
    same(adapted.load(tmp_path / "out").state_dict(), it.merged.state_dict())


def test_values_are_rounded_once_to_the_checkpoints_dtype(case: Any, tmp_path: Path) -> None:
    """Also of a run that trained in another one."""
    it = case("llama", "rows")
    run(tmp_path, "export", it.adapter, "--format", "patch", "--out", "patch", "model.dtype=float32")
    assert file_hash(tmp_path / "patch/patch.safetensors") == file_hash(it.patch / "patch.safetensors")


# -- plain state dicts and folders ------------------------------------------------------------------------------------


def test_the_lines_in_the_documentation(case: Any) -> None:
    """Twenty lines of plain torch and safetensors."""
    text = (ROOT / "docs/export.md").read_text()
    found = re.search(r"```python\n(# apply_patch\.py\n.*?)```", text, re.DOTALL)
    assert found is not None
    lines = [line for line in found.group(1).splitlines() if line.strip()]
    assert len(lines) <= 21
    assert "sparseft" not in found.group(1)
    names: dict[str, Any] = {}
    exec(compile(found.group(1), "docs/export.md", "exec"), names)
    it = case("mixtral", "fused")
    state, base = checkpoint(it.base), checkpoint(it.base)
    former = names["apply_patch"](state, it.patch)
    ours = checkpoint(it.base)
    sparseft.apply_patch(ours, it.patch)
    same(state, ours)
    assert any(not torch.equal(state[name], base[name]) for name in state)
    for name, (index, values) in former.items():
        state[name].view(-1)[index] = values
    same(state, base)


def test_a_state_dict_and_its_undo(case: Any) -> None:
    it = case("gpt2", "dora")
    state, base = checkpoint(it.base), checkpoint(it.base)
    undo = sparseft.apply_patch(state, it.patch)
    with pytest.raises(AssertionError):
        same(state, base)
    undo.save(it.base.parent / "undo")
    sparseft.apply_patch(state, it.base.parent / "undo")
    same(state, base)


def test_a_folder_stays_and_a_new_one_is_patched(case: Any, tmp_path: Path) -> None:
    it = case("llama", "fused")
    hashes = {file.name: file_hash(file) for file in it.base.iterdir()}
    undo = sparseft.apply_patch(it.base, it.patch, out=tmp_path / "patched")
    assert hashes == {file.name: file_hash(file) for file in it.base.iterdir()}
    assert {file.name for file in (tmp_path / "patched").iterdir()} == hashes.keys()
    same(adapted.load(tmp_path / "patched").state_dict(), it.merged.state_dict())
    sparseft.apply_patch(tmp_path / "patched", undo, out=tmp_path / "back")
    same(checkpoint(tmp_path / "back"), checkpoint(it.base))
    with pytest.raises(UserError, match=r"not changed in place: name a new one, apply_patch\(…, out=FOLDER\)"):
        sparseft.apply_patch(it.base, it.patch)
    with pytest.raises(UserError, match="the folder holds other files"):
        sparseft.apply_patch(it.base, it.patch, out=tmp_path / "back")
    with pytest.raises(UserError, match="lies in the folder that is patched"):
        sparseft.apply_patch(it.base, it.patch, out=it.base / "patched")
    assert hashes == {file.name: file_hash(file) for file in it.base.iterdir()}
    assert not list(tmp_path.glob(".partial*"))


def wrong_base(it: Case) -> Any:
    return adapted.build(it.kind, torch.bfloat16, seed=9)


def patched_before(it: Case) -> Any:
    model = adapted.load(it.base)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[7, 3] += 1
    return model


def changed_elsewhere(it: Case) -> Any:
    model = adapted.load(it.base)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    return model


def without(it: Case) -> Any:
    state = checkpoint(it.base)
    del state["model.layers.0.self_attn.v_proj.weight"]
    return state


def without_norm(it: Case) -> Any:
    state = checkpoint(it.base)
    del state["model.norm.weight"]
    return state


def reshaped(it: Case) -> Any:
    state = checkpoint(it.base)
    return state | {(name := "model.layers.0.self_attn.v_proj.weight"): state[name].t().contiguous()}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (wrong_base, "for another base model"),
        (
            lambda it: adapted.build("qwen2", torch.bfloat16),
            r"for another base model .*: its '.*' is \(48, 48\) here",
        ),
        (changed_elsewhere, "for another base model .* or another patch was applied before"),
        (patched_before, "holds neither the values of the base .* nor the patch's"),
        (lambda it: adapted.load(it.base, torch.float32), "is float32, the patch's values are bfloat16: load it in"),
        (without, "sets 'model.layers.0.self_attn.v_proj.weight', which is not there: it is of another model. Did you"),
        (without_norm, "for another base model .*: its 'model.norm.weight' is not here"),
        (reshaped, r"is \(48, 24\), in the patch \(24, 48\)"),
        (
            lambda it: adapted.attached("llama", "rows", adapted.load(it.base)),
            "has an adapter attached: detach or merge",
        ),
        (lambda it: torch.nn.Linear(2, 2), "expected a model of transformers or a state dict"),
        (lambda it: "nowhere", "nowhere: no such folder"),
    ],
)
def test_what_it_was_not_made_for_is_refused_and_left_as_it_is(case: Any, target: Any, said: str) -> None:
    it = case("llama", "rows")
    given = target(it)
    before = None
    if not isinstance(given, str):
        before = {n: t.clone() for n, t in (given if isinstance(given, dict) else given.state_dict()).items()}
    with pytest.raises(UserError, match=said):
        sparseft.apply_patch(given, it.patch)
    if before is not None:
        same(given if isinstance(given, dict) else given.state_dict(), before)


def rewritten(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Both files anew, as if they had been made so."""
    content.pop("sha256", None)
    save_file(tensors, folder / "patch.safetensors", {BODY: body_hash(content)})
    content["sha256"] = file_hash(folder / "patch.safetensors")
    (folder / "patch.json").write_text(json.dumps(content))


V = "model.layers.0.self_attn.v_proj.weight"


def unsorted(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors[f"{V}.indices"] = tensors[f"{V}.indices"].flip(0)


def beyond(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors[f"{V}.indices"][-1] = 24 * 48


def not_a_number(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors[f"{V}.values"][3] = float("nan")


def of_another_dtype(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors[f"{V}.values"] = tensors[f"{V}.values"].float()


def one_more(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors["more.values"] = torch.zeros(1)


def with_a_shape_that_is_none(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    content["checkpoint"]["a"] = 5


def of_another_version(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    content["format_version"] = 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unsorted, "are not sorted, unique and within"),
        (beyond, "are not sorted, unique and within"),
        (not_a_number, "not a number"),
        (of_another_dtype, r"is not as patch\.json describes it"),
        (one_more, r"'more.values' is not in patch\.json"),
        (with_a_shape_that_is_none, "the shape of 'a' in patch.json is not a list"),
        (of_another_version, "patch format 2, this version reads 1"),
    ],
)
def test_a_patch_made_wrong_is_refused(case: Any, tmp_path: Path, change: Any, said: str) -> None:
    it = case("llama", "rows")
    tensors, content = load_file(it.patch / "patch.safetensors"), it.described
    change(tensors, content)
    rewritten(tmp_path, tensors, content)
    with pytest.raises(UserError, match=said):
        sparseft.apply_patch(adapted.load(it.base), tmp_path)


def test_an_altered_patch_is_refused(case: Any, tmp_path: Path) -> None:
    it = case("llama", "rows")
    data, text = (it.patch / "patch.safetensors").read_bytes(), (it.patch / "patch.json").read_text()
    for name, changed, said in (
        ("patch.safetensors", data[:-1] + bytes([data[-1] ^ 1]), "altered"),
        ("patch.safetensors", data[:-7], "truncated or damaged"),
        ("patch.json", text.replace('"method": "sylva"', '"method": "lora"').encode(), "altered"),
        ("patch.json", text[:-9].encode(), "cannot be read as JSON"),
    ):
        (tmp_path / "patch.safetensors").write_bytes(data)
        (tmp_path / "patch.json").write_text(text)
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(UserError, match=said):
            sparseft.apply_patch(adapted.load(it.base), tmp_path)
    (tmp_path / "patch.json").unlink()
    with pytest.raises(UserError, match="no such file, so this is no patch folder"):
        sparseft.Patch.load(tmp_path)


# -- faults that the export must see ----------------------------------------------------------------------------------


def one_value(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors[f"{V}.values"][5] *= 1.01


def one_entry_less(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    for part in ("indices", "values"):
        tensors[f"{V}.{part}"] = tensors[f"{V}.{part}"][1:].clone()
    content["tensors"][V]["count"] -= 1


def another_row(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    index = tensors[f"{V}.indices"]
    tensors[f"{V}.indices"] = torch.where(index < 48, index + 48, index)


def another_tensor(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("v_proj", "k_proj")] = tensors.pop(name)
    content["tensors"] = {name.replace("v_proj", "k_proj"): facts for name, facts in content["tensors"].items()}


def no_tensor(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    tensors.clear()
    content["tensors"] = {}


def differences(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """As if values were differences to the base."""
    tensors[f"{V}.values"] -= 1


@pytest.mark.parametrize("fault", [one_value, one_entry_less, another_row, another_tensor, no_tensor, differences])
def test_a_fault_put_in_on_purpose_is_seen(case: Any, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it, write = case("llama", "rows"), PatchFormat.write

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        tensors, content = load_file(folder / "patch.safetensors"), json.loads((folder / "patch.json").read_text())
        fault(tensors, content)
        rewritten(folder, tensors, content)
        return facts

    monkeypatch.setattr(PatchFormat, "write", damaged)
    done = run(it.base.parent, "export", it.adapter, "--format", "patch", "--out", "faulty", code=1)
    assert "not what was trained" in done.err and "Nothing was kept" in done.err
    assert done.err.count("error:") == 1
    assert not (it.base.parent / "faulty").exists()
    assert not list(it.base.parent.glob(".partial*"))


def test_what_a_patch_cannot_hold_is_refused(case: Any, tmp_path: Path) -> None:
    it = case("llama", "rows")
    words = ("export", it.adapter, "--format", "patch", "--out", "out")
    assert "a patch's values have the dtypes of the base's checkpoint" in refused(
        tmp_path, *words, "--dtype", "float32"
    )
    other = adapted.base("llama", tmp_path / "other", torch.bfloat16, seed=5)
    assert "made for another base model" in refused(tmp_path, *words, f"model.path={other}")
    gpt2 = adapted.base("gpt2", tmp_path / "gpt2")
    assert "made for another base model" in refused(tmp_path, *words, f"model.path={gpt2}")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "quantized" in refused(tmp_path, *words, f"model.path={other}")
    assert not (tmp_path / "out").exists()
