"""Scores against brute force: one sample at a time, autograd's whole weight gradient, loops over units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseft.errors import UserError
from sparseft.importance.batching import groups_of, split_samples
from sparseft.importance.hooks import observe, untouched
from sparseft.importance.scores import compute_scores, gradient_norms
from sparseft.importance.units import Candidate
from sparseft.methods.s2ft import ROLES
from sparseft.models.spec import ModelSpec
from sparseft.selection.budget import block_budget, ratio_budget

# transformers 5 renames the method; peft and these tests call it by the name that 5.0 has too
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
KINDS = ("llama", "qwen2", "gpt2")
DATA_IMPORTANCES = ("activation", "product", "gradient", "fisher")
LENGTHS = (9, 5, 7, 4)


def samples(seed: int = 0, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of one, unpadded; the first half of each is prompt (label -100)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS[:count]:
        ids = torch.randint(3, 96, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def padded(items: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """One batch of all samples, padded on `side`."""
    longest = max(item["input_ids"].shape[1] for item in items)

    def pad(row: Tensor, value: int) -> Tensor:
        fill = torch.full((1, longest - row.shape[1]), value, dtype=row.dtype)
        return torch.cat([row, fill] if side == "right" else [fill, row], dim=1)

    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: torch.cat([pad(item[key], value) for item in items]) for key, value in fills.items()}


def candidates_of(model: nn.Module, kind: str) -> list[Candidate]:
    """Heads and channels of every role, runs of rows and columns, and blocks of 32 with edges."""
    spec = ModelSpec.of(model)
    present = {slot.role for slot in spec.slots}
    units = ratio_budget(spec, {role: 0.5 for role in ROLES if role in present}, scope=None).candidates
    blocks = block_budget(spec, 32, 0.5, scope=None).candidates  # 48, 72 and 80 are no multiples of 32
    down = "transformer.h.0.mlp.c_proj" if kind == "gpt2" else "model.layers.0.mlp.down_proj"
    shape = spec.linears[down]
    extra = [Candidate(down, "rows", shape, 0, 1, shape[0], "r"), Candidate(down, "columns", shape, 3, 5, 4, "c")]
    return units + blocks + extra


def unit_slices(c: Candidate) -> list[tuple[slice, slice]]:
    """(rows, columns) of each unit, by the definition."""
    if c.kind == "blocks":
        down, across = -(-c.shape[0] // c.unit), -(-c.shape[1] // c.unit)
        size = c.unit
        return [
            (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            for i in range(down)
            for j in range(across)
        ]
    runs = [slice(c.start + u * c.unit, c.start + (u + 1) * c.unit) for u in range(c.count)]
    return [(run, slice(None)) if c.kind == "rows" else (slice(None), run) for run in runs]


def logical(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.t() if type(module).__name__ == "Conv1D" else tensor


def brute_force(model: nn.Module, candidates: list[Candidate], importance: str, items: list[dict[str, Tensor]]) -> dict:
    scores = {c.key: torch.zeros(len(unit_slices(c)), dtype=torch.float64) for c in candidates}
    weights = {
        c.key: torch.tensor(
            [
                logical(module, module.weight.detach())[rows, columns].double().norm().item()
                for rows, columns in unit_slices(c)
            ],
            dtype=torch.float64,
        )
        for c in candidates
        for module in [model.get_submodule(c.module)]
    }
    if importance == "weight":
        return weights
    for item in items:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _m, i, o, name=name, seen=seen: seen.update(
                    {name: (i[0][0].detach().double(), o[0].detach().double())}
                )
            )
            for name in {c.module for c in candidates}
        ]
        model.zero_grad()
        output = model(**item)
        for hook in hooks:
            hook.remove()
        # The loss written out: mean cross-entropy of each labelled token given those before it.
        targets = item["labels"][0, 1:]
        log_p = output.logits[0, :-1].float().log_softmax(-1)
        kept = targets != -100
        if not kept.any() and importance in ("gradient", "fisher"):
            continue
        if kept.any():
            (-log_p[kept].gather(1, targets[kept][:, None]).mean()).backward()
        for c in candidates:
            module = model.get_submodule(c.module)
            x, y = seen[c.module]
            for unit, (rows, columns) in enumerate(unit_slices(c)):
                if importance in ("activation", "product"):
                    found = {
                        "rows": lambda: y[:, rows].norm(),  # noqa: B023  (called at once)
                        "columns": lambda: x[:, columns].norm(),  # noqa: B023
                        "blocks": lambda: x[:, columns].norm() * y[:, rows].norm(),  # noqa: B023
                    }[c.kind]()
                else:
                    norm = logical(module, module.weight.grad)[rows, columns].double().norm()
                    found = norm if importance == "gradient" else norm.square()
                scores[c.key][unit] += found.item()
    model.zero_grad()
    return {key: weights[key] * value for key, value in scores.items()} if importance == "product" else scores


def score(model: nn.Module, candidates: list[Candidate], importance: str, batches: Any) -> dict[str, Tensor]:
    return compute_scores(model, candidates, importance, seed=0, batches=batches).scores


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for key, value in right.items():
        assert left[key].dtype == torch.float64 and left[key].device.type == "cpu"
        torch.testing.assert_close(
            left[key], value, rtol=rtol, atol=1e-6 * float(value.max()), msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("importance", ["weight", *DATA_IMPORTANCES])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(make_model: Callable[..., Any], kind: str, importance: str) -> None:
    model = make_model(kind)
    candidates = candidates_of(model, kind)
    kinds = {c.kind for c in candidates}
    assert kinds == {"rows", "columns", "blocks"} and all(len(unit_slices(c)) == c.count for c in candidates)
    items = samples()
    assert_same(score(model, candidates, importance, items), brute_force(model, candidates, importance, items))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("rows",), ("columns",), ("rows", "columns"), ("blocks",)])
@pytest.mark.parametrize("tokens", [1, 13, 200])  # more than features: by the dense gradient
def test_gradient_norms_are_those_of_the_dense_gradient(
    kinds: tuple[str, ...], tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 40, generator=generator).to(dtype)
    gradient = torch.randn(tokens, 56, generator=generator).mul_(1e-4).to(dtype)
    shape = (56, 40)
    known = {
        "rows": [Candidate("m", "rows", shape, 5, 7, 3, "q"), Candidate("m", "rows", shape, 26, 10, 3, "k")],
        "columns": [Candidate("m", "columns", shape, 1, 13, 3)],
        "blocks": [Candidate("m", "blocks", shape, 0, 16, 12)],
    }
    candidates = [c for kind in kinds for c in known[kind]]
    dense = (gradient.double().t() @ x.double()).square()
    found = dict(gradient_norms(x, gradient, candidates))
    assert list(found) == candidates
    for c, sums in found.items():
        wanted = torch.stack([dense[rows, columns].sum() for rows, columns in unit_slices(c)])
        torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=0)


def test_heads_are_counted_from_the_config(make_model: Callable[..., Any]) -> None:
    """Llama: 6 query heads and 2 key/value heads of 12; GPT-2: 4 heads of 12 in each third of the fused projection."""
    llama = {c.key: c for c in candidates_of(make_model("llama"), "llama") if c.role in ROLES}
    attention = "model.layers.1.self_attn."
    found = {k: (c.start, c.unit, c.count) for k, c in llama.items() if k.startswith(attention)}
    assert found == {
        f"{attention}q_proj:q": (0, 12, 6),
        f"{attention}k_proj:k": (0, 12, 2),
        f"{attention}v_proj:v": (0, 12, 2),
        f"{attention}o_proj:o": (0, 12, 6),
    }
    gpt2 = {
        c.role: (c.start, c.unit, c.count) for c in candidates_of(make_model("gpt2"), "gpt2") if "0.attn" in c.module
    }
    assert gpt2 == {"q": (0, 12, 4), "k": (48, 12, 4), "v": (96, 12, 4), "o": (0, 12, 4), None: (0, 32, 4)}


@pytest.mark.parametrize("importance", DATA_IMPORTANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_do_not_matter(
    make_model: Callable[..., Any], kind: str, importance: str, side: str
) -> None:
    model = make_model(kind)
    candidates = candidates_of(model, kind)
    items = samples()
    singles = score(model, candidates, importance, items)
    assert_same(score(model, candidates, importance, [padded(items, side)]), singles)
    assert_same(score(model, candidates, importance, [padded(items[:3], side), items[3]]), singles)


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_what_padding_holds_does_not_matter(make_model: Callable[..., Any], importance: str) -> None:
    model = make_model("llama")
    candidates = candidates_of(model, "llama")
    batch = padded(samples(), "right")
    scores = score(model, candidates, importance, [batch])
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(scores.values(), score(model, candidates, importance, [batch]).values(), strict=True)
    )


def test_prompt_tokens_count(make_model: Callable[..., Any]) -> None:
    """Labels do not change activations, and gradients flow through the prompt: its tokens are in both."""
    model = make_model("llama")
    candidates = candidates_of(model, "llama")
    items = samples(count=1)
    unmasked = [{**items[0], "labels": items[0]["input_ids"]}]
    assert_same(score(model, candidates, "activation", items), score(model, candidates, "activation", unmasked))
    grads = {}
    groups = groups_of(model, items, gradients=True)
    down = "model.layers.0.mlp.down_proj"
    observe(model, [down], groups, lambda seen: grads.update({seen.name: seen.gradient}), gradients=True)
    (grad,) = grads.values()
    assert grad.shape == (9, 48) and (grad[:3].abs().sum(1) > 0).all()


def test_samples_without_a_label_are_passed_over(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    candidates = candidates_of(model, "llama")
    items = samples(count=2)
    empty = {**samples(seed=5)[2], "labels": torch.full((1, 7), -100)}
    only_first = {**samples(seed=6)[2]}
    only_first["labels"] = torch.full((1, 7), -100)
    only_first["labels"][0, 0] = 3  # the first token is predicted by nothing
    batches = [items[0], empty, only_first, items[1]]
    assert_same(score(model, candidates, "fisher", batches), score(model, candidates, "fisher", items))
    with pytest.raises(UserError, match="no sample with a labelled token"):
        score(model, candidates, "gradient", [empty, only_first])
    with pytest.raises(UserError, match="no sample"):
        score(model, candidates, "activation", [])
    with pytest.raises(UserError, match="needs calibration batches"):
        score(model, candidates, "activation", None)
    with pytest.raises(UserError, match="input_ids"):
        score(model, candidates, "activation", [{"ids": torch.ones(1, 3)}])


def test_labels_default_to_the_tokens(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    candidates = candidates_of(model, "gpt2")
    bare = [{"input_ids": item["input_ids"]} for item in samples()]
    full = [{**item, "labels": item["input_ids"]} for item in samples()]
    assert_same(score(model, candidates, "gradient", bare), score(model, candidates, "gradient", full))


def test_bf16_model(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", torch.bfloat16)
    candidates = candidates_of(model, "llama")
    items = samples()
    for importance in ("weight", "activation", "gradient"):
        found, wanted = score(model, candidates, importance, items), brute_force(model, candidates, importance, items)
        assert_same(found, wanted, rtol=5e-2)


def test_random_depends_on_seed_and_name_only(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    candidates = candidates_of(model, "llama")
    first = score(model, candidates, "random", None)
    torch.manual_seed(99)
    assert_same(score(model, list(reversed(candidates)), "random", None), dict(reversed(first.items())), rtol=0)
    other = compute_scores(model, candidates, "random", seed=1).scores
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert len({tuple(value.tolist()) for value in first.values()}) == len(first)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        },
    )


def assert_unchanged(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for left, right in zip(before[:1] + before[2:3], after[:1] + after[2:3], strict=True):
        assert left.keys() == right.keys()
        assert all((a is None and right[k] is None) or torch.equal(a, right[k]) for k, a in left.items())
    assert before[1] == after[1] and before[3:] == after[3:]


@pytest.mark.parametrize("importance", ["activation", "fisher"])
def test_the_model_is_unchanged(make_model: Callable[..., Any], importance: str) -> None:
    model = make_model("llama").train()
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    model(**samples()[0]).loss.backward()  # gradients of the caller's own
    before = snapshot(model)
    random_state = torch.get_rng_state()
    score(model, candidates_of(model, "llama"), importance, samples())
    assert_unchanged(before, snapshot(model))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_the_model_is_unchanged_by_a_failure_midway(make_model: Callable[..., Any], importance: str) -> None:
    model = make_model("gpt2").train()
    before = snapshot(model)
    bad = {"input_ids": torch.tensor([[1, 2, 10_000]])}  # outside the vocabulary
    with pytest.raises(IndexError):
        score(model, candidates_of(model, "gpt2"), importance, [samples()[0], bad])

    def batches() -> Any:
        yield samples()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, candidates_of(model, "gpt2"), importance, batches())

    def failing(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gradients = importance == "gradient"
        groups = groups_of(model, samples(), gradients=gradients)
        observe(model, ["transformer.h.0.mlp.c_fc"], groups, failing, gradients=gradients)
    assert_unchanged(before, snapshot(model))


def test_dropout_is_off_during_calibration(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    candidates = candidates_of(model, "gpt2")
    assert_same(score(model, candidates, "fisher", samples()), score(model, candidates, "fisher", samples()), rtol=1e-9)


def test_gradient_checkpointing_counts_nothing_twice(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    candidates = candidates_of(model, "llama")
    expected = score(model, candidates, "fisher", samples())
    model.gradient_checkpointing_enable()
    model.train()
    for importance in ("fisher", "activation"):
        found = score(model, candidates, importance, samples())
        if importance == "fisher":
            assert_same(found, expected)
    assert model.is_gradient_checkpointing and model.training


def test_each_group_is_reported_with_its_samples(make_model: Callable[..., Any]) -> None:
    seen: list[int] = []
    model = make_model("llama")
    groups = groups_of(model, [padded(samples(), "right")], gradients=False)
    up = "model.layers.0.mlp.up_proj"
    count = observe(model, [up], groups, lambda _: None, gradients=False, reached=seen.append)
    assert seen == [1, 1, 1, 1] and count == 4


def test_split_samples_keeps_other_columns() -> None:
    batch = padded(samples(), "left") | {"position_ids": torch.arange(9).expand(4, 9), "weight": torch.arange(4)}
    parts = list(split_samples(batch))
    assert [part["input_ids"].shape[1] for part in parts] == list(LENGTHS)
    assert [part["position_ids"][0, 0].item() for part in parts] == [9 - n for n in LENGTHS]
    assert [part["weight"].tolist() for part in parts] == [[0], [1], [2], [3]]


def test_untouched_restores_after_an_exception(make_model: Callable[..., Any]) -> None:
    model = make_model("llama").train()
    model.lm_head.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), untouched(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert_unchanged(before, snapshot(model))
