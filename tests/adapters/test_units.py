"""An adapter's units: slopes by finite differences, scaling against files, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparseft
from sparseft.adapters.lifecycle import units
from sparseft.errors import UserError
from sparseft.kernels.grid import pairs
from support.adapters import METHODS, build, randomise, reselected


def ids(seed: int = 0, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(seed))


SIZE = {"mixtral": 0.01}  # of deltas: larger ones send tokens to other experts, and the loss jumps


def sparse(kind: str, method: str) -> Any:
    return randomise(sparseft.attach(build(kind), METHODS[method](0)), scale=SIZE.get(kind, 0.3)).eval()


def lora(kind: str, seed: int = 3, **settings: Any) -> Any:
    """A LoRA with random factors, as training leaves them."""
    model = sparseft.attach(build(kind), sparseft.LoraConfig(rank=3, dropout=0.0, alpha=5.0, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.copy_(SIZE.get(kind, 0.2) ** 0.5 * 0.45 * torch.randn(parameter.shape, generator=generator))
    return model


def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].double()  # transformers' own loss is in fp32
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


CASES = [(kind, method) for kind in ("llama", "gpt2", "mixtral") for method in (*METHODS, "lora")]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_slopes_are_finite_differences(kind: str, method: str) -> None:
    """At factors that are neither 0 nor 1, so that nothing rests on where they are."""
    model = lora(kind) if method == "lora" else sparse(kind, method)
    found = units(model)
    assert found and sum(map(len, found.values())) > 3
    tokens, start = ids(), 0.6
    for each in found.values():
        each.scale(torch.full((len(each),), start))
    loss(model, tokens).backward()
    step = 0.03  # the model computes in fp32
    for number, each in enumerate(found.values()):
        slopes, unit = each.slopes(), number % len(each)
        at = {}
        for steps in (2, 1, -1, -2, 0):
            factors = torch.full((len(each),), start, dtype=torch.float64)
            factors[unit] += steps * step
            each.scale(factors)
            with torch.no_grad():
                at[steps] = float(loss(model, tokens))
        expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
        assert slopes[unit] == pytest.approx(expected, rel=0.02, abs=2e-5)


@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_what_is_saved_is_factor_times_delta_and_nothing_else(method: str, tmp_path: Path) -> None:
    model = lora("llama") if method == "lora" else sparse("llama", method)
    before = read(sparseft.save_adapter(model, tmp_path / "before"))
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, each in units(model).items():
        factors[name] = torch.rand(len(each), generator=generator)
        factors[name][0] = 0
        each.scale(factors[name])
    folder = sparseft.save_adapter(model, tmp_path / "after")
    after = read(folder)
    assert before.keys() == after.keys()
    scaled = 0
    for key, value in before.items():
        kind = key.split(".")[-2]
        if key.endswith(".index") or ".lora_A." in key:
            assert torch.equal(after[key], value)
            continue
        own = next(f for name, f in factors.items() if name in key or name.replace(".default", "") == key)
        if kind == "grid":  # a factor for each of its rows, whose entries follow one another
            of_entry = pairs(before[key.replace(".delta", ".index")])[:, 0].unique(return_inverse=True)[1]
            assert torch.equal(after[key], value * own[of_entry])
            scaled += 1
            continue
        shape = [-1] + [1] * (value.dim() - 1) if kind in ("rows", "blocks") else [1, -1]
        assert torch.equal(after[key], value * own.view(shape))
        scaled += 1
    assert scaled == len(factors)
    fresh = sparseft.load_adapter(build("llama"), folder).eval()
    torch.testing.assert_close(fresh(input_ids=ids()).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize("method", [*METHODS, "lora"])
@torch.no_grad()
def test_none_is_the_base_and_all_is_as_trained_bit_for_bit(method: str) -> None:
    base = build("llama")(input_ids=ids()).logits
    model = lora("llama") if method == "lora" else sparse("llama", method)
    trained = model(input_ids=ids()).logits
    found = units(model)
    for factor, expected in ((0.0, base), (0.3, None), (1.0, trained)):
        for each in found.values():
            each.scale(torch.full((len(each),), factor))
        logits = model(input_ids=ids()).logits
        if expected is None:
            assert not torch.equal(logits, base) and not torch.equal(logits, trained)
        else:
            assert torch.equal(logits, expected)


def test_entries_that_re_selection_put_aside_are_units_once_the_adapter_is_loaded(tmp_path: Path) -> None:
    model = reselected(build("llama"))
    folder = sparseft.save_adapter(model, tmp_path / "adapter")
    count = sum(len(value) for key, value in read(folder).items() if key.endswith(".index"))
    assert sum(map(len, units(sparseft.load_adapter(build("llama"), folder)).values())) == count


def test_what_is_no_sum_of_parts_is_refused() -> None:
    with pytest.raises(UserError, match="no sum of parts"):
        units(lora("llama", use_dora=True))
    with pytest.raises(UserError, match="full fine-tuning"):
        units(sparseft.attach(build("llama"), sparseft.FullConfig()))
    with pytest.raises(UserError, match="no adapter"):
        units(build("llama"))
    with pytest.raises(UserError, match="no adapter is active"):
        units(sparseft.set_adapter(sparse("llama", "s2ft"), None))


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
