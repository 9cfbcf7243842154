"""Re-selection by running gradients: what is seen in which step, what is chosen by it, and what of it is kept."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparseft
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.importance.units import sum_units
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from sparseft.selection.choose import choose
from sparseft.selection.compute import Request, as_trained
from sparseft.training.reselection.running import Running, check_seen
from support.adapters import build
from support.running import refused
from support.running import sparseft as command

METHODS = {
    "columns": lambda **own: sparseft.S2FTConfig(d_ratio=0.1, o_ratio=0.3, **own),
    "rows": lambda **own: sparseft.S2FTConfig(u_ratio=0.1, v_ratio=0.5, **own),
    "permuted": lambda **own: sparseft.S2FTConfig(d_ratio=0.1, u_ratio=0.1, layout="permuted", **own),
    "blocks": lambda **own: sparseft.SylvaConfig(sparsity=0.9, block_size=4, importance="random", **own),
}
CASES = [("llama", method) for method in METHODS] + [("gpt2", "columns"), ("gpt2", "blocks")]


def watched(make_model: Any, kind: str, method: str, steps: int, **own: Any) -> tuple[Any, Running]:
    model = make_model(kind)
    spec = ModelSpec.of(model)
    config = METHODS[method](reselect_steps=steps, reselect_by="running", **own)
    model = sparseft.attach(model, config)
    return model, Running(steps, model, spec, as_trained(model, config, spec=spec), order=config.order, seed=0)


def batch(step: int, micro: int) -> torch.Tensor:
    return torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2 * step + micro))


def go(model: Any, running: Running, steps: int, start: int = 0, rate: float = 0.05) -> None:
    """The loop that a Trainer makes, two micro-steps a step, with plain SGD."""
    optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=rate)
    state = SimpleNamespace(global_step=start, max_steps=999)
    known: dict[str, Any] = {"model": model, "optimizer": optimizer}
    for step in range(start, start + steps):
        running.on_step_begin(None, state, None, **known)
        for micro in range(2):
            ids = batch(step, micro)
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        optimizer.step()
        running.on_optimizer_step(None, state, None, **known)
        optimizer.zero_grad()
        state.global_step += 1
        running.on_step_end(None, state, None, **known)


def dense_norms(model: Any, make_model: Any, kind: str, running: Running, step: int) -> dict[str, torch.Tensor]:
    """By autograd on a plain model with the same weights: of each unit the norms of its part of the micro-steps' whole
    gradients, summed."""
    plain = make_model(kind)
    plain.load_state_dict(sparseft.merge(copy.deepcopy(model)).state_dict())
    total: dict[str, torch.Tensor] = {}
    for micro in range(2):
        plain.zero_grad()
        (plain(input_ids=batch(step, micro), labels=batch(step, micro)).loss / 2).backward()
        for c in running.budget.candidates:
            gradient = plain.get_submodule(c.module).weight.grad
            gradient = gradient.t() if kind == "gpt2" else gradient
            norms = sum_units(gradient.double().square(), c).sqrt()
            total[c.key] = total.get(c.key, 0) + norms
    return total


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_unit_is_scored_by_the_dense_gradient(make_model: Any, kind: str, method: str) -> None:
    """Trained or not: against autograd on a plain model that is given the same weights before every step."""
    model, running = watched(make_model, kind, method, steps=5)
    wanted = {c.key: torch.zeros(c.count, dtype=torch.float64) for c in running.budget.candidates}
    for step in range(4):
        found = dense_norms(model, make_model, kind, running, step)
        for c in running.budget.candidates:
            if c.module in running.turn(step):
                wanted[c.key] += found[c.key]
        go(model, running, 1, start=step)
    assert all(float(value.min()) > 0 for value in wanted.values())  # each was looked at
    for key, value in wanted.items():
        torch.testing.assert_close(running.sums.totals[key], value, rtol=1e-3, atol=1e-8)
    found = dense_norms(model, make_model, kind, running, 4)
    for c in running.budget.candidates:
        if c.module in running.turn(4):
            wanted[c.key] += found[c.key]
    go(model, running, 1, start=4)  # at its end is the choice
    best = choose(running.budget, wanted, order="largest", allocation="per_layer", seed=5)
    layers = sparse_layers(model)
    for module, kinds in best.modules.items():
        for pattern, index in kinds.items():
            assert sorted(layers[module].patterns[pattern].index.tolist()) == sorted(index.tolist())
    assert not any(total.any() for total in running.sums.totals.values())  # seen anew from here on


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_seen_once(make_model: Any, reentrant: bool) -> None:
    found = []
    for recomputed in (False, True):
        model, running = watched(make_model, "llama", "blocks", 3)
        model.train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        go(model, running, 2)
        found.append(running.sums.totals)
    for key, total in found[0].items():
        torch.testing.assert_close(found[1][key], total, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_layers_take_turns(make_model: Any, steps: int) -> None:
    """One layer at a time where there are steps enough; all of them by the time of the choice."""
    _, running = watched(make_model, "llama", "columns", steps)
    layers = [{name.split(".")[2] for name in running.turn(step)} for step in range(2 * steps)]
    assert layers[:steps] == layers[steps:]
    times = Counter(layer for looked in layers[:steps] for layer in looked)
    assert len(times) == len(running.turns) and max(times.values()) - min(times.values()) <= 1
    assert max(map(len, layers)) == max(1, -(-len(running.turns) // steps))


def test_nothing_is_looked_at_between_steps(make_model: Any) -> None:
    model, running = watched(make_model, "llama", "columns", 3)
    go(model, running, 2)
    assert not any(layer._forward_hooks for layer in sparse_layers(model).values())
    before = {key: total.clone() for key, total in running.sums.totals.items()}
    model(input_ids=batch(9, 0), labels=batch(9, 0)).loss.backward()
    assert all(torch.equal(total, before[key]) for key, total in running.sums.totals.items())


def test_a_step_that_is_not_finite_counts_nothing(make_model: Any) -> None:
    model, running = watched(make_model, "llama", "columns", 9)
    go(model, running, 1)
    before = {key: total.clone() for key, total in running.sums.totals.items()}
    name = running.turn(1)[-1]
    hook = sparse_layers(model)[name].register_full_backward_pre_hook(
        lambda _m, gradients: (gradients[0] * float("inf"),)
    )
    go(model, running, 1, start=1, rate=0.0)
    hook.remove()
    assert torch.equal(running.sums.totals[running.by_module[name][0].key], before[running.by_module[name][0].key])
    assert all(total.isfinite().all() for total in running.sums.totals.values())


def test_a_step_weighs_the_same_in_any_number_of_processes(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks each makes one of two micro-steps, with twice its share of the loss, as gradients are averaged."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for count in (1, 2):
        model, running = watched(make_model, "llama", "columns", 4)
        monkeypatch.setattr(ranks, "rank_and_world", lambda count=count: (0, count))
        monkeypatch.setattr(ranks, "all_reduce_sum", lambda tensor: None)  # both ranks' passes are made here
        running.look(0)
        for micro in range(2):
            (model(input_ids=batch(0, micro), labels=batch(0, micro)).loss / 2 * count).backward()
        running.on_step_end(None, SimpleNamespace(global_step=1, max_steps=999), None, model=model, optimizer=None)
        seen[count] = {key: total.clone() for key, total in running.sums.totals.items()}
    assert any(total.any() for total in seen[1].values())
    for key, total in seen[1].items():
        assert torch.allclose(seen[2][key], total, rtol=1e-6), key


@pytest.mark.parametrize("order", ["largest", "smallest", "sampled"])
@pytest.mark.parametrize("method", ["columns", "permuted", "blocks"])
def test_what_no_step_has_shown_stays(make_model: Any, method: str, order: str) -> None:
    """A run that goes on without the sums of the steps before."""
    model, running = watched(make_model, "llama", method, 4, order=order)
    before = indices(model)
    go(model, running, 2, start=2)  # the second half: the first layer had its turns
    after = indices(model)
    unseen = set(before) - {(name, kind) for name, kind in before if name in running.turn(3)}
    assert unseen and all(after[each] == before[each] for each in unseen)
    assert any(after[each] != before[each] for each in set(before) - unseen)


def indices(model: Any) -> dict[tuple[str, str], list[Any]]:
    layers = sparse_layers(model)
    return {(n, kind): sorted(p.index.tolist()) for n, layer in layers.items() for kind, p in layer.patterns.items()}


def test_what_was_seen_is_kept(make_model: Any, tmp_path: Path) -> None:
    model, running = watched(make_model, "llama", "columns", 5)
    go(model, running, 3)
    running.save(tmp_path)
    spec = ModelSpec.of(make_model("llama"))

    def again(other: Any, budget: Any, spec: Any = spec) -> Running:
        return Running(5, other, spec, budget, order="largest", seed=0, resumed=str(tmp_path))

    found = again(model, running.budget).sums.totals
    assert all(torch.equal(found[key], total) for key, total in running.sums.totals.items())
    with pytest.raises(UserError, match="does not fit the model's linear|other linears"):
        other, its = watched(make_model, "llama", "rows", 5)
        again(other, its.budget)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    words = ["method=s2ft", "method.reselect_steps=5", "method.reselect_by=running", "trainer.compile=layers"]
    assert "trainer.compile=layers: method.reselect_by=running looks at gradients" in refused(tmp_path, "train", *words)


def test_experts_of_a_3d_parameter_are_refused_before_the_selection(tmp_path: Path) -> None:
    model = build("mixtral")
    model.resize_token_embeddings(1079)  # what the bundled tokenizer knows
    model.save_pretrained(tmp_path / "model")
    words = ["method=losia", f"model.path={tmp_path / 'model'}", "model.tokenizer=bundled:tiny"]
    assert "use method.reselect_by=calibration" in refused(tmp_path, "train", "--plan", *words)
    words += ["dataset=text", "dataset.train_path=bundled:data/text/train.txt", "output_dir=run"]
    done = command(tmp_path, "train", *words, "trainer.max_steps=1", code=2)
    assert "experts are kept as one 3-D parameter" in done.err and "selection: computed" not in done.err
    assert not list(tmp_path.rglob("selection*"))


def test_linears_beside_such_experts_are_not() -> None:
    config = METHODS["blocks"](reselect_steps=5, scope="self_attn")
    check_seen(Request.of(ModelSpec.of(build("mixtral")), config), config)
