"""Where a model's weights lie in its checkpoint, held against the files and against transformers' own loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.files.tensors import Stored, stored_tensors, write_streamed
from sparseft.models.checkpoint import Checkpoint, Places, saved_tensors, weight_of, without_weights
from support import adapted, experts


def places_of(folder: Path) -> tuple[Checkpoint, Places]:
    config = ModelConfig(path=str(folder))
    checkpoint = Checkpoint.of(config)
    return checkpoint, Places(without_weights(config), checkpoint.tensors)


def check(folder: Path, model: Any) -> None:
    """Every entry of every parameter is found in the files and back again."""
    checkpoint, places = places_of(folder)
    parameters = dict(model.named_parameters())
    assert set(places.parameters) == set(parameters)
    for name, values in places.stored(lambda name: parameters[name].detach()):
        assert torch.equal(values, checkpoint.read(name)), name
    for name, parameter in parameters.items():
        flat = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))[:200]
        parts = places.in_checkpoint(name, flat)
        assert sum(len(part.index) for part in parts) == len(flat)
        for part in parts:
            assert (part.index.diff() > 0).all()
            there = checkpoint.read(part.name).flatten()[part.index]
            assert torch.equal(there, parameter.detach().flatten()[flat[part.which]])
            backs = places.in_model(part.name, part.index)
            assert sum(len(back.index) for back in backs) == len(part.index)
            for back in backs:
                assert torch.equal(parameters[back.name].detach().flatten()[back.index], there[back.which])
        assert torch.equal(places.parameter(name, checkpoint.read), parameter.detach())
        pieces = list(places.pieces(name, checkpoint.read))
        assert len(pieces) == (len(parameter) if parameter.dim() == 3 and parameter.shape[1] > 1 else 1)
        assert [start for start, _ in pieces] == [number * len(pieces[0][1]) for number in range(len(pieces))]
        assert torch.equal(torch.cat([piece for _, piece in pieces]), parameter.detach().flatten())
    entries = dict(places.entries(checkpoint.read))
    assert list(entries) == sorted(parameters)
    for name, parameter in parameters.items():
        flat = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))[:64]
        assert entries[name].shape == parameter.shape
        assert torch.equal(entries[name].at(flat), parameter.detach().flatten()[flat])


def test_of_a_few_tensors_no_other_parameters_are_asked_for(tmp_path: Path) -> None:
    """Each file of a large model asks for its own: all of the model for each of them would take hours."""
    adapted.base("mixtral", tmp_path)
    _, places = places_of(tmp_path)
    asked: list[str] = []
    parameters = dict(adapted.load(tmp_path).named_parameters())
    found = places.stored(lambda name: asked.append(name) or parameters[name].detach(), {"model.norm.weight"})
    assert [name for name, _ in found] == asked == ["model.norm.weight"]


@pytest.mark.parametrize("kind", adapted.BASES)
def test_every_entry_is_found(kind: str, tmp_path: Path) -> None:
    adapted.base(kind, tmp_path, shard="70KB")
    model = adapted.load(tmp_path)
    check(tmp_path, model)
    assert len(set(Checkpoint.of_folder(tmp_path).files.values())) > 1
    assert saved_tensors(model) == Checkpoint.of_folder(tmp_path).tensors


def test_a_fresh_model_is_saved_under_the_names_that_are_told(tmp_path: Path) -> None:
    for kind in ("mixtral", "qwen3_moe"):
        model = experts.build(kind)
        model.save_pretrained(tmp_path / kind)
        assert saved_tensors(model) == Checkpoint.of_folder(tmp_path / kind).tensors


def renamed(folder: Path, rename: Any) -> dict[str, Any]:
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_a_checkpoint_that_lacks_the_prefix(tmp_path: Path) -> None:
    """As GPT-2's own: `h.0.attn…`, where the model says `transformer.h.0.attn…`."""
    adapted.base("gpt2", tmp_path)
    tensors = renamed(tmp_path, lambda name: name.removeprefix("transformer."))
    assert "h.0.attn.c_attn.weight" in tensors
    check(tmp_path, adapted.load(tmp_path))


def test_a_tied_weight_that_the_file_holds_twice(tmp_path: Path) -> None:
    adapted.base("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, adapted.load(tmp_path))
    _, places = places_of(tmp_path)
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(places.names())


def test_experts_that_the_file_keeps_in_one_tensor(tmp_path: Path) -> None:
    config = transformers.GraniteMoeConfig(**experts.SIZES, num_local_experts=4)
    experts.build("granitemoe", config=config).save_pretrained(tmp_path)
    assert any("input_linear" in name for name in Checkpoint.of_folder(tmp_path).tensors)
    check(tmp_path, adapted.load(tmp_path))


def test_a_convolution_is_one_piece(tmp_path: Path) -> None:
    """Its weight (channels, 1, width) is no stack of matrices."""
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.backbone.layers[0].mixer.conv1d.weight.shape == (32, 1, 4)
    model.save_pretrained(tmp_path)
    check(tmp_path, adapted.load(tmp_path))


@pytest.mark.parametrize("rows", [-3, 3])
def test_a_tensor_of_another_shape_than_the_config_says_is_refused(rows: int, tmp_path: Path) -> None:
    adapted.base("llama", tmp_path)
    name = "model.embed_tokens.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    size, width = tensors[name].shape
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])[: size + rows].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, places = places_of(tmp_path)
    entries, flat = dict(places.entries(checkpoint.read)), torch.tensor([0])
    for look in (
        lambda: entries[name].at(flat),
        lambda: places.in_checkpoint(name, flat),
        lambda: places.parameter(name, checkpoint.read),
        lambda: next(places.pieces(name, checkpoint.read)),
    ):
        with pytest.raises(UserError) as error:
            look()
        said = f"{tmp_path}: {name} is ({size + rows}, {width}) in the checkpoint, ({size}, {width}) by its config."
        assert str(error.value) == said


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    adapted.base("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^{tmp_path}: model\.layers\.0\..*w1\.weight.* equal size, but"):
        places_of(tmp_path)


@pytest.mark.parametrize("kind", adapted.BASES)
def test_a_linears_entries(kind: str, tmp_path: Path) -> None:
    """The logical (out, in) entry is the one by which the module multiplies, however it is stored."""
    from sparseft.layers.convert import plain_weight

    adapted.base(kind, tmp_path)
    model = adapted.load(tmp_path)
    for module in adapted.modules(kind):
        weight, logical = weight_of(model, module), plain_weight(model, module)
        assert weight.shape == tuple(logical.shape)
        entries = torch.arange(logical.numel())
        there = model.get_parameter(weight.parameter).detach().flatten()[weight.flat(entries)]
        assert torch.equal(there, logical.flatten())
    with pytest.raises(UserError, match="no module 'model.layers.9.nothing'"):
        weight_of(model, "model.layers.9.nothing")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors and no"):
        Checkpoint.of_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(UserError, match="is no file of the folder"):
        Checkpoint.of_folder(tmp_path)
    adapted.base("llama", tmp_path / "cut", shard="70KB")
    next((tmp_path / "cut").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="no such file"):
        Checkpoint.of_folder(tmp_path / "cut")


def test_a_file_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Read by safetensors itself, tensors of every width, in another order than they lie, and an empty one."""
    tensors = {
        "b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7, dtype=torch.int32), "e": torch.zeros(0, 4),
        "c": torch.randn(2, 3).t(), "d": torch.arange(3), "f": torch.tensor(2.0), "g": torch.tensor([True, False]),
    }  # fmt: skip
    facts = {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "file.safetensors"
    write_streamed(path, facts, iter(tensors.items()), {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert stored_tensors(path, "model") == facts


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    """The second is asked for when the first is in the file."""
    sizes = []

    def tensors():
        for name in "ab":
            sizes.append((tmp_path / "x").stat().st_size)
            yield name, torch.zeros(2**16)

    write_streamed(tmp_path / "x", dict.fromkeys("ab", Stored(torch.float32, (2**16,))), tensors(), {})
    assert sizes[1] - sizes[0] >= 2**17


@pytest.mark.parametrize(
    "tensors",
    [[("b", torch.zeros(2))], [("a", torch.zeros(3))], [], [("a", torch.zeros(2).half())]],
)
def test_what_the_header_does_not_say_is_a_fault(tmp_path: Path, tensors: list) -> None:
    with pytest.raises(AssertionError):
        write_streamed(tmp_path / "x", {"a": Stored(torch.float32, (2,))}, tensors, {})
