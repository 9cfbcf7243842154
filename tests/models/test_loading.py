"""What of a checkpoint is read: to which device, in which dtype, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models import loading
from sparseft.models.loading import load_model, load_tokenizer
from support.models import build_model, build_tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_tensors_are_read_to_their_device_at_once(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for one that is not the host: nothing is moved there afterwards, ties and dtypes are the
    host's."""
    build_model(kind, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    config = ModelConfig(path=str(tmp_path), dtype=dtype)
    host, moved = load_model(config), []
    move = torch.nn.Module.to

    def watched(module: Any, *args: Any, **options: Any) -> Any:
        moved.extend(tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)
        return move(module, *args, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "to", watched)
    monkeypatch.setattr(loading, "check_causal", lambda *_: None)  # without values nothing can be tried
    away = load_model(config, "meta")
    assert not moved and not hasattr(away, "hf_device_map")  # by which the Trainer would take it for split
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(away, of)()), dict(getattr(host, of)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].is_meta and (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("where", ["the model", "the text", "the file"])
def test_the_dtype_of_a_checkpoint(where: str, tmp_path: Path) -> None:
    build_model("llama", torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    if where != "the model":
        del content["dtype"]
    file.write_text(json.dumps(content))
    config = ModelConfig(path=str(tmp_path))
    read = loading.load_config(config)
    if where == "the text":  # as a model that takes images says it
        text = transformers.LlamaConfig(dtype="bfloat16")
        read.get_text_config = lambda *_, **__: text
    assert loading.model_dtype(config, read) == load_model(config).dtype == torch.bfloat16
    assert loading.model_dtype(ModelConfig(path=str(tmp_path), dtype="float16"), read) == torch.float16


def test_weights_without_a_place_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    load_model(ModelConfig(path=str(tmp_path)))
    assert "warning" not in capsys.readouterr().err
    file = tmp_path / "config.json"
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}  # biases of q, k, v
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    load_model(ModelConfig(path=str(tmp_path)))
    said = " ".join(capsys.readouterr().err.split())
    assert "no place for 6 weights of the checkpoint" in said and "model.layers.0.self_attn.k_proj.bias for one" in said


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("device", "sharded", "given"),
    [("cpu", False, None), ("cuda", False, "cuda:3"), ("cuda:1", False, "cuda:1"), ("cuda", True, None)],
)
def test_what_transformers_is_asked_for(
    device: str, sharded: bool, given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on the CPU, and nothing in shards, which DeepSpeed places. Of several GPUs this process's own one: the
    threads that read weights have the first as theirs."""
    build_model("llama").save_pretrained(tmp_path)
    options: dict[str, Any] = {}

    def asked(_path: str, **given: Any) -> None:
        options.update(given)
        raise Asked

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", asked)
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: sharded)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(Asked):
        load_model(ModelConfig(path=str(tmp_path)), device)
    assert options.get("device_map") == (None if given is None else {"": torch.device(given)})


def test_a_tokenizer_needs_no_model_beside_it(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    found = load_tokenizer(ModelConfig(path="someone/model", tokenizer=str(tmp_path)))
    assert found("true")["input_ids"] == build_tokenizer()("true")["input_ids"]


@pytest.mark.parametrize(("tokenizer", "given"), [(None, "v2"), ("some/model", "v2"), ("some/tokenizer", None)])
def test_a_revision_is_of_the_models_own_repository(
    tokenizer: str | None, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}

    def loaded(_: str, **given: Any) -> SimpleNamespace:
        options.update(given)
        return SimpleNamespace()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loaded)
    load_tokenizer(ModelConfig(path="some/model", revision="v2", tokenizer=tokenizer))
    assert options.get("revision") == given


def test_a_tokenizer_on_which_its_library_panics_is_one_sentence(tmp_path: Path) -> None:
    """A panic of what is written in Rust is no `Exception`."""
    build_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAQAAAEAAAD/////"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(UserError, match=f"^model.path={tmp_path}: the tokenizer could not be loaded: ."):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
