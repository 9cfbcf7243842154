"""A decoder layer at a time: the scores of all layers at once, in the memory of one; what is not suited is said."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sparseft
from sparseft.importance import batching, kfac, layerwise, room, scores
from sparseft.importance.calibration import Watch
from sparseft.importance.kfac import FactorSettings, KroneckerFactors
from sparseft.memory import AllocationCounter, tensor_bytes
from sparseft.models.spec import ModelSpec
from support.calibration import LENGTHS, samples

LINE = "calibration: layer by layer"
ASCENDING = tuple(sorted(LENGTHS))
LONGEST_OF_TWO = {LENGTHS: {9, 12}, ASCENDING: {5, 9, 12}}


def scored(model: nn.Module, importance: str = "sylva", **options: Any) -> scores.Scored:
    scope = options.pop("scope", None)
    budget = sparseft.SylvaConfig(sparsity=0.9, block_size=8, scope=scope).budget(ModelSpec.of(model))
    return scores.compute_scores(
        model, budget.candidates, importance, **{"seed": 0, "batches": samples(), "by_layer": True} | options
    )


def assert_equal(left: scores.Scored, right: scores.Scored) -> None:
    assert left.scores.keys() == right.scores.keys() and left.facts == right.facts
    for key, value in right.scores.items():
        assert torch.equal(left.scores[key], value), key
    assert any(value.any() for value in right.scores.values())


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "TOKENS_TOGETHER", 24)  # several groups of several samples, most of them padded


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_it_chooses_what_all_layers_at_once_choose(
    make_model: Callable[..., Any], kind: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(kind, dtype)
    for importance in ("sylva", "gradient"):
        at_once = scored(model, importance, by_layer=False)
        assert LINE not in capsys.readouterr().err
        assert_equal(scored(model, importance), at_once)
        assert LINE in capsys.readouterr().err


@pytest.mark.parametrize("importance", ["random", "weight", "activation", "product", "gradient", "fisher", "sylva"])
def test_heads_and_channels_too(make_model: Callable[..., Any], importance: str) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = sparseft.S2FTConfig(importance=importance, q_ratio=0.3, v_ratio=0.5, o_ratio=0.3, d_ratio=0.1)
    one, other = (sparseft.compute_selection(model, config, samples(), by_layer=way) for way in (True, False))
    assert one.digest() == other.digest()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_layer_is_given_beside_the_hidden_state(make_model: Callable[..., Any]) -> None:
    """Positions of the caller's own, masks of eager attention, and windows in every other layer only."""
    ids = samples((8,))[0]["input_ids"]
    own = [{"input_ids": ids, "position_ids": torch.arange(8)[None] * 3, "labels": ids}]
    model = make_model("qwen2")
    assert_equal(scored(model, batches=own), scored(model, batches=own, by_layer=False))
    model.set_attn_implementation("eager")
    assert_equal(scored(model), scored(model, by_layer=False))
    model.set_attn_implementation("sdpa")
    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 1
        + ["sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    windows = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert_equal(scored(windows), scored(windows, by_layer=False))


def test_layers_below_the_scope_are_not_run_again(make_model: Callable[..., Any]) -> None:
    model, ran = make_model("llama"), []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, n=number: ran.append(n))
    at_once = scored(model, scope="layers.1.", by_layer=False)
    ran.clear()
    assert_equal(scored(model, scope="layers.1."), at_once)
    groups = 3
    assert ran == [0, 1, 0, 1] + [0, 1] * groups + [1] * groups  # the trial, forward, back


@pytest.mark.parametrize("lengths", [LENGTHS, ASCENDING], ids=["mixed", "ascending"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_all_passes_take_the_room_of_the_longest(
    attention: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held until the walk is over."""
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    monkeypatch.setattr(batching, "WINDOW", 2)  # groups of two in the order that is given
    back: list[bool] = []
    held: list[Tensor] = []
    of_layer = layerwise.Walk._back
    monkeypatch.setattr(layerwise.Walk, "_back", lambda *given: back.append(True) or of_layer(*given))
    given = samples(lengths)
    at_once = scored(model, batches=given, by_layer=False)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _m, _a, kwargs: held.append(kwargs["attention_mask"]) if back else None, with_kwargs=True
        )
    assert_equal(scored(model, batches=given), at_once)
    assert len(held) == 3 * 3 and {mask.shape for mask in held} == {(2, 1, n, n) for n in LONGEST_OF_TWO[lengths]}
    # torch's attention wants rows that begin at multiples of 16 numbers
    assert tensor_bytes(held) == 12 * (16 if attention == "sdpa" else 12) * 4


def test_masks_that_have_nothing_in_common_are_compared_with_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of packed rows, with the mask of whole rows now and again, which is shared all the same."""
    compared: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda one, other: compared.append(1) or equal(one, other))
    masks, passes = layerwise.Masks(), 64
    whole = torch.full((12, 12), -1.0).triu(1)
    calls, given = [], []
    for number in range(passes):
        packed = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(number))
        for mask in (packed, whole[None, None, : 3 + number % 10, : 3 + number % 10].clone()):
            call = layerwise.Call(torch.Size((1, mask.shape[-1], 8)), None, (), {"attention_mask": mask})
            calls.append(masks.of_pass()(call))
            given.append(mask.clone())
    assert len(compared) <= 2 * passes * (layerwise.KINDS + 1)
    taken: list[Tensor] = []
    for call in calls:
        call.again(lambda x, attention_mask: taken.append(attention_mask) or x, torch.zeros(1))  # type: ignore[arg-type]
    assert all(map(equal, taken, given))
    assert tensor_bytes(taken) == (passes + 1) * 12 * 12 * 4


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_one_layers_whatever_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept hidden states lie in a file."""
    ids = torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    monkeypatch.setattr(scores, "TOKENS_TOGETHER", 96)
    held: list[int] = []
    score = KroneckerFactors.score

    def noted(self: KroneckerFactors, *args: Any) -> None:
        gc.collect()
        held.append(tensor_bytes(self.state()[0].values()))
        return score(self, *args)

    monkeypatch.setattr(KroneckerFactors, "score", noted)

    def peak(depth: int) -> int:
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=depth, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        held.clear()
        chosen = sparseft.SylvaConfig(sparsity=0.95, block_size=16, num_partition=1, damping=100.0)
        with AllocationCounter() as counter:
            sparseft.compute_selection(model, chosen, [batch], by_layer=True)
        assert len(held) == depth and len(set(held)) == 1  # one layer's sums, each time
        selected = 8 * 2 * depth * (2**17 // 256)  # every block's score, and what comes of it
        return counter.peak - selected

    shallow, deep = peak(2), peak(6)
    layer = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 344 * 128)
    assert held[0] >= layer  # the summed gradients are among it
    assert deep <= shallow + layer // 4
    assert deep < 2.5 * held[0]


def test_loads_come_in_order_each_one_ahead_of_the_work() -> None:
    events: list[tuple[str, int]] = []

    def load(number: int) -> tuple[Tensor, ...]:
        events.append(("load", number))
        return (torch.tensor(number), torch.tensor(-number))

    for hidden, gradient in room.ahead([partial(load, number) for number in range(4)], torch.device("cpu")):
        assert int(hidden) == -int(gradient)
        events.append(("work", int(hidden)))
    order = [("load", 0), ("load", 1), ("work", 0), ("load", 2), ("work", 1), ("load", 3), ("work", 2), ("work", 3)]
    assert events == order
    assert not list(room.ahead([], torch.device("cpu")))


def test_each_pass_gets_its_own_samples_whatever_their_lengths(make_model: Callable[..., Any]) -> None:
    """Of every layer and pass: what it is given again is what it was given in the forward pass, in the same order."""
    model = make_model("llama")
    given: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _m, a, n=number: given[n].append(a[0].detach().clone()))
    scored(model)
    for states in given.values():  # before these the trial
        assert len({state.shape for state in states[-3:]}) == 3
        assert all(torch.equal(one, again) for one, again in zip(states[-6:-3], states[-3:], strict=True))


def test_the_memory_that_is_free_decides(
    make_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model("llama")
    at_once = scored(model, by_layer=None)
    assert LINE not in capsys.readouterr().err
    needed = kfac.statistics_bytes(FactorSettings(), ModelSpec.of(model).linears.values())
    monkeypatch.setattr(room, "available_bytes", lambda: 4 * needed - 4)
    assert_equal(scored(model, by_layer=None), at_once)
    assert f"{LINE}; hidden states (0.0 GiB) are kept on disk" in capsys.readouterr().err
    monkeypatch.setattr(room, "available_bytes", lambda: 4096)
    assert_equal(scored(model, by_layer=None, watch=Watch(resume=tmp_path / "partial")), at_once)
    assert LINE in capsys.readouterr().err and not list(tmp_path.iterdir())
    long = samples((128,) * 60)  # hidden states of more than the sums
    scored(model, by_layer=None, batches=long)
    assert (
        "all layers at once, as hidden states (0.0 GiB) would take more disk than the sums" in capsys.readouterr().err
    )
    monkeypatch.setattr(room, "DISK", "")  # activations and their norms take no sums of layers
    scored(model, "fisher", by_layer=None)
    assert not capsys.readouterr().err


# -- what is not suited -----------------------------------------------------------------------------------------------


def twice(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def skipping(model: Any) -> None:
    """What the first layer gives is added to what the second one is given, and goes round it."""
    kept: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, y: kept.append(y))
    model.model.norm.register_forward_pre_hook(lambda _m, inputs: (inputs[0] + 0.1 * kept.pop(),))


def shared(model: Any) -> None:
    """A layer is given what another has computed."""
    first, second = model.model.layers
    kept: list[Tensor] = []
    first.register_forward_hook(lambda _m, _i, y: kept.append(y))
    second.register_forward_pre_hook(lambda _m, a, k: (a, k | {"other": kept.pop()}), with_kwargs=True, prepend=True)


def nameless(model: Any) -> None:
    for layer in model.model.layers:
        plain = layer.forward
        layer.forward = lambda *a, state=None, plain=plain, **k: plain(
            state if state is not None else a[0], *a[1:], **k
        )
        layer.register_forward_pre_hook(lambda _m, a, k: (a[1:], k | {"state": a[0]}), with_kwargs=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (twice, "its decoder layers are not called once each"),
        (skipping, "is not what it is within the model"),
        (shared, "given more of another one than its hidden state"),
        (nameless, "no hidden state by which to know it"),
    ],
)
def test_unusual_layers_are_taken_at_once_with_a_word(
    make_model: Callable[..., Any], change: Callable[..., None], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama")
    change(model)
    budget = sparseft.SylvaConfig(sparsity=0.9, block_size=8, scope="layers.0").budget(ModelSpec.of(model))
    one, other = (
        scores.compute_scores(model, budget.candidates, "fisher", seed=0, batches=samples(), by_layer=way)
        for way in (True, False)
    )
    assert_equal(one, other)
    err = capsys.readouterr().err
    assert reason in err and err.count("calibration: all layers at once, as ") == 1


@pytest.mark.parametrize("router_loss", [False, True])
def test_experts_one_layer_at_a_time(router_loss: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, output_router_logits=router_loss,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    chosen = sparseft.SylvaConfig(sparsity=0.75, block_size=8)
    one, other = (sparseft.compute_selection(model, chosen, samples(), by_layer=way) for way in (True, False))
    assert one.digest() == other.digest()
    err = capsys.readouterr().err
    assert ("is not what it is within the model" in err) == router_loss and (LINE in err) != router_loss


# -- interruptions ----------------------------------------------------------------------------------------------------


def test_it_goes_on_below_the_layers_that_are_done(
    make_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = make_model("llama"), tmp_path / "key.partial"
    whole, seen = scored(model), []

    def stop(when: Callable[[int], bool]) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            assert total == 14
            seen.append(done)
            if when(done):
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):  # within the first layer: nothing is done
        scored(model, watch=Watch(None, stop(lambda done: len(seen) == 2), folder))
    assert seen == [0, 0] and not folder.exists()
    with pytest.raises(KeyboardInterrupt):  # within the second
        scored(model, watch=Watch(None, stop(lambda done: seen.count(7) == 2), folder))
    assert [path.name for path in folder.iterdir()] == ["layers-0of1.safetensors"]
    seen.clear()
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, n=number: ran.append(n))
        for number, layer in enumerate(model.model.layers)
    ]
    capsys.readouterr()
    # by_layer=None: what was begun so goes on so, though there is room for all layers
    assert_equal(scored(model, by_layer=None, watch=Watch(None, stop(lambda _: False), folder)), whole)
    for handle in handles:
        handle.remove()
    assert seen == [7, 7, 7, 14] and "goes on below decoder layer 1" in capsys.readouterr().err
    assert ran[4:] == [0] * 6  # after the trial: three groups forward and back, of the first layer alone
    kept = folder / "layers-0of1.safetensors"
    content = kept.read_bytes()
    few = samples((9, 5))
    assert_equal(scored(model, batches=few, watch=Watch(resume=folder)), scored(model, batches=few))
    assert "of other samples, so it starts anew" in capsys.readouterr().err
    kept.write_bytes(content[:200])
    assert_equal(scored(model, watch=Watch(resume=folder)), whole)
    assert "cannot be used, so calibration starts anew" in capsys.readouterr().err


def test_it_ends_with_a_failure_midway(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2").train()
    flags = [m.training for m in model.modules()]

    def fail(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scored(model, watch=Watch(None, fail))
    assert flags == [m.training for m in model.modules()] and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    nothing = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}]
    with pytest.raises(sparseft.errors.UserError, match="no sample with a labelled token"):
        scored(model, batches=nothing)
