"""A batch in which each row has an adapter of its own, against the same rows one by one."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.adapters import by_row
from sparseft.adapters.state import state_of
from sparseft.errors import RunError, UserError
from sparseft.layers import sparse_layers
from sparseft.selection.selection import Selection
from support.adapters import METHODS, build, randomise, reselected, saved

NAMES = ["s2ft", None, "sylva", "fused", "default", "paca", "s2ft", None, "sylva", "s2ft"]


def ids(rows: int = len(NAMES), tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def attention_only(kind: str) -> dict[str, Any]:
    """Of Mixtral what no expert has."""
    return {"scope": "self_attn"} if kind == "mixtral" else {}


def loaded(kind: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model with adapters of all methods, one that re-selection has changed, and a sum of several."""
    if kind == "mixtral":
        model = build(kind, dtype)
        rows = {f"model.layers.{n}.self_attn.q_proj": {"rows": [n, 5]} for n in range(2)}
        randomise(sparseft.attach(model, sparseft.S2FTConfig(), Selection(rows)), 9)
        configs = {
            "s2ft": Selection({"model.layers.0.self_attn.o_proj": {"columns": [3, 1]}}),
            "sylva": Selection({"model.layers.1.self_attn.v_proj": {"blocks": [[0, 1], [0, 0]]}}, block_size=16),
            "paca": Selection({"model.layers.1.self_attn.k_proj": {"columns": [30]}}),
        }
        for name, selection in configs.items():
            folder = saved(lambda: build(kind, dtype), tmp_path / name, sparseft.SylvaConfig(), 3, selection)
            sparseft.load_adapter(model, folder, name, activate=False)
    else:
        model = reselected(build(kind, dtype))
        for seed, (name, config) in enumerate(METHODS.items()):
            folder = saved(lambda: build(kind, dtype), tmp_path / name, config(seed), seed)
            sparseft.load_adapter(model, folder, name, keep=("device", "disk", "host")[seed % 3], activate=False)
    return sparseft.fuse(model, {"s2ft": 1.0, "sylva": -0.5, "default": 0.7}, "fused")


@torch.no_grad()
def one_by_one(model: Any, inputs: Tensor, names: list[str | None]) -> Tensor:
    found = []
    for row, name in zip(inputs, names, strict=True):
        sparseft.set_adapter(model, name)
        found.append(model(input_ids=row[None]).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("active", ["fused", None])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "phi3", "mixtral"])
def test_equals_one_by_one(kind: str, active: str | None, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    expected = one_by_one(model, ids(), NAMES)
    sparseft.set_adapter(model, active)
    alone = model(input_ids=ids()).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        found = model(input_ids=ids(), adapter_names=NAMES).logits
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    # nothing of the call is left
    assert state_of(model).active == active
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules() if module is not model)
    assert torch.equal(model(input_ids=ids()).logits, alone)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bf16_equals_one_by_one_to_rounding(kind: str, tmp_path: Path) -> None:
    """No further from the exact logits than each adapter alone is, whose sum with the base is rounded too."""
    model = loaded(kind, tmp_path, torch.bfloat16)
    exact = loaded(kind, tmp_path / "exact")
    base = dict(build(kind, torch.bfloat16).named_parameters())
    sparseft.set_adapter(exact, None)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in base:
                parameter.copy_(base[name].float())
    reference = one_by_one(exact, ids(), NAMES)
    alone = one_by_one(model, ids(), NAMES).float()
    with torch.no_grad():
        mixed = model(input_ids=ids(), adapter_names=NAMES).logits.float()
    error, usual = ((found - reference).norm(dim=(1, 2)) for found in (mixed, alone))
    assert (error <= 1.5 * usual).all(), (error, usual)


def generated(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    return model.generate(inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generate(kind: str, beams: dict[str, int], tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    sequences = beams.get("num_return_sequences", 1)
    found = generated(model, ids(), adapter_names=NAMES, **beams).view(len(NAMES), sequences, -1)
    assert state_of(model).active == "fused"
    distinct = set()
    for row, name in enumerate(NAMES):
        sparseft.set_adapter(model, name)
        assert torch.equal(found[row], generated(model, ids()[row : row + 1], **beams)), name
        distinct.add(tuple(found[row].flatten().tolist()))
    assert len(distinct) == len(NAMES)
    sampled = model.generate(ids(), adapter_names=NAMES, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert len(sampled) == 3 * len(NAMES)


def test_padding_and_embeddings(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    mask = torch.ones_like(ids())
    mask[3, :4] = 0
    with torch.no_grad():
        found = model(input_ids=ids(), attention_mask=mask, adapter_names=NAMES).logits
        embedded = model.get_input_embeddings()(ids())
        other = model(inputs_embeds=embedded, attention_mask=mask, adapter_names=NAMES).logits
        positional = model(ids(), mask, adapter_names=NAMES).logits
        sparseft.set_adapter(model, NAMES[3])
        expected = model(input_ids=ids()[3:4], attention_mask=mask[3:4]).logits
    torch.testing.assert_close(found[3, 4:], expected[0, 4:], atol=5e-5, rtol=1e-5)
    assert torch.equal(found, other) and torch.equal(found, positional)


def test_permuted_layout(tmp_path: Path) -> None:
    config = sparseft.S2FTConfig(u_ratio=0.1, d_ratio=0.2, importance="random", layout="permuted")
    model = randomise(sparseft.attach(build("llama"), config), 1)
    folder = saved(lambda: build("llama"), tmp_path / "paca", sparseft.PacaConfig(rank=2, importance="random"), 2)
    sparseft.load_adapter(model, folder, "paca", activate=False)
    assert any(layer.is_permuted for layer in sparse_layers(model).values())
    with torch.no_grad():
        found = model(input_ids=ids(3), adapter_names=["default", "paca", None]).logits
    assert any(layer.is_permuted for layer in sparse_layers(model).values())
    expected = one_by_one(model, ids(3), ["default", "paca", None])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_trained_since_counts(fused: bool, tmp_path: Path) -> None:
    """The deltas that the last call gathered are not taken for those of today, whatever their versions say."""
    model = loaded("llama", tmp_path)
    names: list[str | None] = ["default", "fused", None]
    with torch.no_grad():
        before = model(input_ids=ids(3), adapter_names=names).logits
    sparseft.set_adapter(model, "default")
    trained = sparseft.trainable_parameters(model).values()
    optimizer = torch.optim.AdamW(trained, fused=True, lr=1e-2) if fused else torch.optim.SGD(trained, lr=1.0)
    model(input_ids=ids(3), labels=ids(3)).loss.backward()
    optimizer.step()
    expected = one_by_one(model, ids(3), names)
    with torch.no_grad():
        found = model(input_ids=ids(3), adapter_names=names).logits
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    assert (found[0] - before[0]).abs().max() > 1e-3
    folder = saved(lambda: build("llama"), tmp_path / "other", METHODS["sylva"](5), 5)
    sparseft.load_adapter(model, folder, "fused", activate=False)
    torch.testing.assert_close(
        model(input_ids=ids(3), adapter_names=names).logits, one_by_one(model, ids(3), names), atol=5e-5, rtol=1e-5
    )


def test_what_is_refused(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    for call in (model, model.generate):
        with pytest.raises(UserError, match=r"no adapter is called 's2tf'\. Did you mean 's2ft'\?"):
            call(ids(2), adapter_names=["s2tf", None])
        with pytest.raises(UserError, match="3 names for a batch of 2 rows"):
            call(ids(2), adapter_names=["s2ft", None, None])
        with pytest.raises(UserError, match="expected a list with a name or None for each row"):
            call(ids(2), adapter_names="s2ft")
        with pytest.raises(UserError, match="1 names for a batch of 0 rows"):
            call(ids(2)[0], adapter_names=["s2ft"])
    model.train()
    with pytest.raises(UserError, match=r"call model.eval\(\) first"):
        model(ids(2), adapter_names=["s2ft", None])
    model.eval()
    assert state_of(model).active == "fused"
    with pytest.raises(IndexError):  # a pass that fails leaves nothing either
        model(ids(2) + 1000, adapter_names=["s2ft", None])
    assert state_of(model).active == "fused"
    assert not any(module._forward_hooks for module in model.modules() if module is not model)
    full = sparseft.attach(build("llama"), sparseft.FullConfig())
    with pytest.raises(UserError):
        full.eval()(ids(2), adapter_names=[None, "default"])


def test_experts_are_refused(tmp_path: Path) -> None:
    model = randomise(sparseft.attach(build("mixtral"), METHODS["s2ft"](0)), 1)
    before = model(ids(2)).logits
    with pytest.raises(UserError, match="'default' trains experts"):
        model(ids(2), adapter_names=["default", None])
    assert state_of(model).active == "default" and torch.equal(model(ids(2)).logits, before)


def test_a_refused_pass_leaves_compiling_as_it_was(tmp_path: Path) -> None:
    """Compiled code is set aside for a batch by row: also where the batch is refused then."""
    from torch._dynamo import eval_frame  # as where something was compiled

    assert eval_frame._stance.stance == "default"
    model = randomise(sparseft.attach(build("mixtral"), METHODS["s2ft"](0))).eval()
    with pytest.raises(UserError, match="trains experts"):
        model(input_ids=ids(2), adapter_names=["default", None])
    assert eval_frame._stance.stance == "default"


def test_threads_that_overlap_leave_compiling_as_it_was() -> None:
    """The compiler's stance is the process's: one thread comes after another and goes later."""
    from torch._dynamo import eval_frame

    by_row._eager.__enter__()
    by_row._eager.__enter__()
    by_row._eager.__exit__()
    assert eval_frame._stance.stance == "force_eager"
    by_row._eager.__exit__()
    assert eval_frame._stance.stance == "default"


def test_names_that_mean_the_base_are_no_names(tmp_path: Path) -> None:
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 0)
    model = sparseft.load_adapter(build("llama"), folder, "a.b/ü")
    for name in ("", "__base__", None):
        with pytest.raises(UserError, match="an adapter cannot be called"):
            sparseft.load_adapter(model, folder, name)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="an adapter cannot be called"):
            sparseft.fuse(model, {"a.b/ü": 1.0}, name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no adapter is called ''"):
        sparseft.save_adapter(model, tmp_path / "b", "")
    assert state_of(model).active == "a.b/ü" and list(state_of(model).kind.names(model)) == ["a.b/ü"]


def test_detached_models_and_copies_are_their_own(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    twin = copy.deepcopy(model)
    sparseft.set_adapter(model, None)
    expected = one_by_one(twin, ids(2), ["s2ft", "sylva"])
    with torch.no_grad():
        torch.testing.assert_close(twin(ids(2), adapter_names=["s2ft", "sylva"]).logits, expected)
        assert generated(twin, ids(2), adapter_names=["s2ft", "sylva"]).shape[0] == 2
    assert state_of(model).active is None and state_of(twin).active == "sylva"
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    two = {"max_new_tokens": 3, "do_sample": False, "adapter_names": ["s2ft", None]}
    assert torch.equal(read.generate(ids(2), **two), twin.generate(ids(2), **two))
    plain = sparseft.detach(model)
    assert not plain._forward_pre_hooks and not plain._forward_hooks and "generate" not in vars(plain)
    assert not plain._forward_pre_hooks_with_kwargs and not plain._forward_hooks_always_called
    with pytest.raises((ValueError, TypeError)):
        generated(plain, ids(2), adapter_names=["s2ft", "sylva"])


def test_threads_have_rows_of_their_own(tmp_path: Path) -> None:
    from torch._dynamo import eval_frame  # as where something was compiled

    model = loaded("llama", tmp_path)
    sparseft.set_adapter(model, None)
    lists: list[list[str | None]] = [["s2ft", None], ["sylva", "paca"], [None, "fused"], ["s2ft", None]]
    expected = [one_by_one(model, ids(2), names) for names in lists]
    sparseft.set_adapter(model, None)
    wrong: list[Any] = []

    def serve(names: list[str | None], own: Tensor) -> None:
        for _ in range(15):
            with torch.no_grad():
                found = model(ids(2), adapter_names=names).logits
                base = model(ids(2)).logits
            if (found - own).abs().max() > 1e-4 or (names[1] is None and (base[1] - own[1]).abs().max() > 1e-4):
                wrong.append(names)

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(lists, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert eval_frame._stance.stance == "default"


def test_what_another_thread_keeps_meanwhile_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Between what a call has made for its names and its use of it, another call keeps what it has made."""
    model = loaded("llama", tmp_path)
    state = state_of(model)
    assert state is not None
    theirs = state.kind._linears(model, state, ["s2ft"])

    class Overtaken(type(state.kind)):
        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            if name == "_rows":
                object.__setattr__(self, name, ([-1], [], theirs))

    state.kind.__class__ = Overtaken
    own = state.kind._linears(model, state, ["sylva", "paca"])
    assert own is not theirs and {number for each in own.values() for number in each.adapters} == {0, 1}


def test_layers_that_see_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hands a linear tokens of which nobody knows the row is refused, not computed wrongly."""
    model = loaded("llama", tmp_path)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(
        mlp, "forward", lambda x: torch.cat([forward(x.flatten(0, 1)[:6]), forward(x.flatten(0, 1)[6:])]).view_as(x)
    )
    with pytest.raises(RunError, match="use one adapter at a time"):
        model(ids(3), adapter_names=["s2ft", None, "sylva"])
    assert state_of(model).active == "fused"


@pytest.mark.slow
def test_compiled_models(tmp_path: Path) -> None:
    """What was compiled calls no hook that came later: the base's logits must not pass for those of the rows."""
    model = loaded("llama", tmp_path)
    sparseft.set_adapter(model, None)
    expected = one_by_one(model, ids(3), ["s2ft", None, "sylva"])
    sparseft.set_adapter(model, None)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        base = compiled(input_ids=ids(3)).logits
        with pytest.raises(UserError, match="call the model that was given to torch.compile"):
            compiled(input_ids=ids(3), adapter_names=["s2ft", None, "sylva"])
        assert torch.equal(compiled(input_ids=ids(3)).logits, base)
        for layer in model.model.layers:  # in parts
            layer.compile(backend="eager")
        assert torch.equal(model(input_ids=ids(3)).logits, base)
        found = model(input_ids=ids(3), adapter_names=["s2ft", None, "sylva"]).logits
        assert torch.equal(model(input_ids=ids(3)).logits, base)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


# ---- peft's ----


@pytest.fixture
def lora(tmp_path: Path) -> Any:
    model: Any = build("llama")
    for number, name in enumerate(("math", "chat")):
        one = sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2 + number))
        with torch.no_grad():
            for parameter in sparseft.trainable_parameters(one).values():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
        sparseft.save_adapter(one, tmp_path / name)
        model = sparseft.load_adapter(model, tmp_path / name, name)
    return model.eval()


@pytest.mark.parametrize("active", ["math", None])
def test_peft(lora: Any, active: str | None) -> None:
    names: list[str | None] = ["math", None, "chat", "math"]
    expected = one_by_one(lora, ids(4), names)
    sparseft.set_adapter(lora, active)
    alone = lora(ids(4)).logits
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids(4), adapter_names=names).logits, expected, atol=5e-5, rtol=1e-5)
        spelt = ["math", "__base__", "chat", "math"]
        torch.testing.assert_close(lora(input_ids=ids(4), adapter_names=spelt).logits, expected, atol=5e-5, rtol=1e-5)
        assert torch.equal(lora(input_ids=ids(2), adapter_names=[None, None]).logits, build("llama")(ids(2)).logits)
    assert torch.equal(lora(ids(4)).logits, alone)
    found = generated(lora, input_ids := ids(4), adapter_names=names)
    beams = generated(lora, input_ids, adapter_names=names, num_beams=2)
    for row, name in enumerate(names):
        sparseft.set_adapter(lora, name)
        assert torch.equal(found[row], generated(lora, ids(4)[row : row + 1])[0])
        assert torch.equal(beams[row], generated(lora, ids(4)[row : row + 1], num_beams=2)[0])


def test_peft_refusals(lora: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter is called 'mth'. Did you mean 'math'"):
        lora(ids(2), adapter_names=["mth", None])
    with pytest.raises(UserError, match="1 names for a batch of 2 rows"):
        generated(lora, ids(2), adapter_names=["math"])
    dora = sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2, use_dora=True)).eval()
    with pytest.raises(UserError, match="'default' is a DoRA adapter"):
        dora(ids(2), adapter_names=["default", None])
    base = sparseft.detach(lora)
    assert not base._forward_pre_hooks and "generate" not in vars(base)
