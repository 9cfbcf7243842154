"""GGUF files as bases: the values of their blocks, everything that is done on a plain base, and what is refused."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparseft
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models.loading import load_model, load_tokenizer
from support.gguf_base import write_base
from support.models import build_tokenizer, wide_base
from support.running import METHODS, on, refused, write_data
from support.running import sparseft as run

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where unpacked files are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sparseft" / "gguf"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that was quantized."""
    return wide_base(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def written(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return write_base(load_model(ModelConfig(path=str(dense))), folder / "small.Q4_1.gguf", "Q4_1", build_tokenizer())


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path))


def stood_for(values: torch.Tensor, kind: str) -> torch.Tensor:
    """What a matrix becomes in GGUF's blocks, by the package gguf itself; blocks lie in rows, whatever their order."""
    stored = gguf.GGMLQuantizationType[kind]
    numbers = values.float().numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(numbers, stored), stored))


@pytest.mark.parametrize(("kind", "dtype"), [
    ("Q4_0", torch.bfloat16), ("Q4_1", torch.bfloat16), ("Q8_0", torch.bfloat16),
    ("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32),
])  # fmt: skip
def test_values_are_the_files(kind: str, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    plain = load_model(ModelConfig(path=str(dense)))
    file = write_base(plain, tmp_path / f"m.{kind}.gguf", kind, build_tokenizer())
    model = load_model(ModelConfig(path=str(file)))
    state, before = model.state_dict(), plain.state_dict()
    assert state.keys() == before.keys()
    for name, values in before.items():
        want = values if values.dim() == 1 else stood_for(values, kind)
        assert state[name].dtype == dtype and torch.equal(state[name], want.to(dtype)), name
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    tokens = torch.arange(3, 15).reshape(2, 6)
    assert torch.isfinite(model(tokens).logits).all()
    text = "### Human: is it true? the answer is 7"
    tokenizer, own = load_tokenizer(ModelConfig(path=str(file))), build_tokenizer()
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own(text)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_file_is_unpacked_once_and_anew_when_it_changes(
    file: Path, dense: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(ModelConfig(path=str(file)))
    assert "unpacking it to bfloat16, once: what comes of it is kept in " + str(home) in capsys.readouterr().err
    (kept,) = home.iterdir()
    assert "quantization_config" not in json.loads((kept / "config.json").read_text())
    load_model(ModelConfig(path=str(file)))
    assert "unpacking" not in capsys.readouterr().err
    write_base(load_model(ModelConfig(path=str(dense))), file, "Q8_0", build_tokenizer())
    load_model(ModelConfig(path=str(file)))
    assert len(list(home.iterdir())) == 2


def test_of_several_processes_one_unpacks(file: Path, home: Path) -> None:
    from sparseft.models import gguf

    begun: list[Path] = []

    def slow(file: Path, what: str, folder: Path, make: Any = gguf._unpack) -> None:
        begun.append(folder)
        time.sleep(0.3)
        make(file, what, folder)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(3) as pool:
        patch.setattr(gguf, "_unpack", slow)
        folders = list(pool.map(lambda _: gguf.unpacked(file, str(file)), range(3)))
    assert len(begun) == 1 and set(folders) == set(begun)


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora"])
def test_a_run_from_training_to_export(method: str, file: Path, tmp_path: Path, home: Path) -> None:
    words = on(file, write_data(tmp_path)["json"])
    run(tmp_path, "train", *words, *METHODS[method], "trainer.max_steps=2", "trainer.learning_rate=1e-2",
        "output_dir=run")  # fmt: skip
    adapter = tmp_path / "run" / "adapter"
    described = json.loads((adapter / "adapter_config.json").read_text())
    named = described["base_model_name_or_path"] if method == "lora" else described["base_model"]
    (unpacked,) = home.iterdir()
    assert Path(named) in (file, unpacked)  # PEFT's own files name what transformers loads
    done = run(tmp_path, "export", "run", "--format", "merged", "--out", "whole", "hardware=cpu", "--json").json
    assert done["format"] == "merged"
    whole = load_model(ModelConfig(path=str(tmp_path / "whole")))
    wanted = sparseft.merge(sparseft.load_adapter(load_model(ModelConfig(path=str(file))), adapter))
    for name, values in wanted.state_dict().items():
        assert torch.equal(whole.state_dict()[name], values), name
    assert run(tmp_path, "eval", "boolq", "--run", "run", "--limit", "2", "eval.data_dir=bundled:data").code == 0


@pytest.mark.parametrize("config", [
    sparseft.S2FTConfig(sparsity=0.9, importance="random", roles=["o", "down"]),
    sparseft.SylvaConfig(sparsity=0.9, importance="random", block_size=8),
])  # fmt: skip
def test_adapters_are_the_unpacked_models(config: Any, file: Path, tmp_path: Path) -> None:
    """From the file to the model that transformers makes of it by itself, and back; undone bit for bit."""
    import transformers

    alone = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    alone.save_pretrained(tmp_path / "alone")
    tokens = torch.arange(12).reshape(2, 6)
    places = [str(file), str(tmp_path / "alone")]
    for here, there in (places, reversed(places)):
        model = load_model(ModelConfig(path=here))
        base = model(tokens).logits
        model = sparseft.attach(model, config)
        own = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
        model(tokens, labels=tokens).loss.backward()
        own.step()
        learnt = model(tokens).logits
        assert not torch.equal(learnt, base)
        folder = sparseft.save_adapter(model, tmp_path / f"adapter-of-{Path(here).name}")
        assert torch.equal(sparseft.detach(model)(tokens).logits, base)
        other = load_model(ModelConfig(path=there))
        assert torch.equal(other(tokens).logits, base)
        other = sparseft.load_adapter(other, folder)
        assert torch.equal(other(tokens).logits, learnt)


def test_unpacked_weights_can_be_packed_on_loading(file: Path) -> None:
    pytest.importorskip("torchao")
    from sparseft.models.packed.quantized import is_packed

    model = load_model(ModelConfig(path=str(file), quantize="int8"))
    assert is_packed(model.model.layers[0].mlp.up_proj)


def test_what_cannot_be_read_is_refused(file: Path, dense: Path, tmp_path: Path, home: Path) -> None:
    data = write_data(tmp_path)["json"]
    whole = file.read_bytes()

    def said(path: Path) -> str:
        return refused(tmp_path, "train", *on(path, data), "method=s2ft", "output_dir=run")

    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(4000))
    assert "no GGUF file that transformers can read: GGUF magic invalid" in said(tmp_path / "other.gguf")
    for length in (0, 3, 20, 4000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert "cut.gguf: no GGUF file that transformers can read: " in said(tmp_path / "cut.gguf")
    assert "no such file" in said(tmp_path / "smal.Q4_1.gguf")
    assert "Did you mean" in said(tmp_path / "smal.Q4_1.gguf")
    (tmp_path / "only").mkdir()
    shutil.copy(file, tmp_path / "only" / "a.gguf")
    assert f"model.path={tmp_path / 'only' / 'a.gguf'}" in said(tmp_path / "only")
    assert not (tmp_path / "run").exists() and not home.exists()


@pytest.mark.parametrize(("add", "said"), [
    (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), r"rope_freqs.weight scales its positions"),
    (lambda w: w.add_string("llama.rope.scaling.type", "linear"), r"llama.rope.scaling.type scales its positions"),
    (lambda w: w.add_float32("llama.rope.scaling.factor", 4), r"llama.rope.scaling.factor scales its positions"),
    (lambda w: w.add_float32("llama.rope.scale_linear", 4), r"llama.rope.scale_linear scales its positions"),
    (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), r"of its [\d,]+ values transformers reads"),
    (lambda w: w.add_uint16("split.count", 3), r"one of 3 parts of a model"),
])  # fmt: skip
def test_what_would_be_another_model_is_refused(
    add: Any, said: str, dense: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads no scaling of positions, and drops what its model has no place for."""
    write = gguf.GGUFWriter.write_header_to_file
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", lambda self, *a: (add(self), write(self, *a))[1])
    file = write_base(load_model(ModelConfig(path=str(dense))), tmp_path / "m.gguf", "Q8_0", build_tokenizer())
    with pytest.raises(UserError, match="m.gguf: .*" + said):
        load_model(ModelConfig(path=str(file)))
    assert not home.exists() or not any(home.iterdir())


def test_positions_that_are_not_scaled(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf.GGUFWriter.write_header_to_file

    def header(self: Any, *a: Any) -> None:
        self.add_string("llama.rope.scaling.type", "none")
        self.add_float32("llama.rope.scaling.factor", 1)
        write(self, *a)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", header)
    load_model(ModelConfig(path=str(write_base(load_model(ModelConfig(path=str(dense))), tmp_path / "m.gguf"))))


def test_nothing_beside_a_file_is_read(
    file: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another model's tokenizer in its folder, nor a file of its name in the working directory."""
    alone, own = load_model(ModelConfig(path=str(file))), load_tokenizer(ModelConfig(path=str(file)))
    crowd, here = tmp_path / "crowd", tmp_path / "here"
    for folder in (crowd, here):
        folder.mkdir()
    shutil.copy(file, crowd / "m.gguf")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (crowd / name).write_text(json.dumps({"model_type": "gpt2", "eos_token": "the", "do_sample": True}))
    (crowd / "added_tokens.json").write_text(json.dumps({"another": 3}))
    (crowd / "chat_template.jinja").write_text("another")
    other = load_model(ModelConfig(path=str(dense)))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    write_base(other, here / "m.gguf", "F32", build_tokenizer())
    monkeypatch.chdir(here)
    model, tokenizer = (load(ModelConfig(path="../crowd/m.gguf")) for load in (load_model, load_tokenizer))
    for name, values in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], values), name
    assert model.generation_config.to_dict() == alone.generation_config.to_dict()
    assert tokenizer.get_vocab() == own.get_vocab() and tokenizer.eos_token == own.eos_token
    assert tokenizer.chat_template == own.chat_template


def test_no_tokenizer_and_no_package(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_base(load_model(ModelConfig(path=str(dense))), tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(ModelConfig(path=str(file)))
    words = on(file, write_data(tmp_path)["json"])
    run(tmp_path, "train", *words, "method=s2ft", f"model.tokenizer={dense}", "trainer.max_steps=1", "output_dir=run")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    file.touch()
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'sparseft\[quantized\]'"):
        load_model(ModelConfig(path=str(file)))
