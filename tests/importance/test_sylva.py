"""Sylva's importance end to end, against a brute-force computation with dense matrices in float64."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseft
from sparseft.importance import kfac
from sparseft.importance.multilevel import Multilevel
from sparseft.importance.scores import compute_scores
from sparseft.memory import AllocationCounter, tensor_bytes
from sparseft.models.spec import ModelSpec


def samples(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in range(9, 9 + count):
        ids = torch.randint(3, 96, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def dense_scores(model, batches, damping: float = 1e-3) -> dict[str, torch.Tensor]:
    """Score of every weight entry (out, in) by the definition, with per-sample gradients from plain autograd."""
    model = copy.deepcopy(model).double().eval()
    spec = ModelSpec.of(model)
    inputs, outputs, grads = ({name: [] for name in spec.linears} for _ in range(3))
    for name in spec.linears:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, n=name: inputs[n].append(i[0].detach().flatten(0, -2)))
        module.register_full_backward_hook(lambda m, gi, go, n=name: outputs[n].append(go[0].detach().flatten(0, -2)))
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in spec.linears:
            gradient = model.get_submodule(name).weight.grad.clone()
            grads[name].append(gradient.t() if name in spec.transposed else gradient)
    scores = {}
    for name in spec.linears:
        a, g = torch.cat(inputs[name]), torch.cat(outputs[name])
        A, G = a.t() @ a / len(a), g.t() @ g / len(g)
        mean = torch.stack(grads[name]).mean(0)

        def inverse_diagonal(matrix: torch.Tensor) -> torch.Tensor:
            shift = damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
            return torch.linalg.inv(matrix + shift).diagonal()

        column = torch.einsum("oi,op,pi->i", mean, G, mean) / inverse_diagonal(A)
        row = torch.einsum("oi,ij,oj->o", mean, A, mean) / inverse_diagonal(G)
        scores[name] = torch.outer(row, column)
    return scores


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_exact_statistics_choose_the_brute_force_blocks(make_model, kind):
    model, batches, size = make_model(kind), samples(), 16
    config = sparseft.SylvaConfig(sparsity=0.8, block_size=size, num_partition=0)
    selection = sparseft.compute_selection(model, config, batches)
    for name, entries in dense_scores(model, batches).items():
        rows, columns = entries.shape
        padded = torch.zeros(math.ceil(rows / size) * size, math.ceil(columns / size) * size, dtype=torch.float64)
        padded[:rows, :columns] = entries
        blocks = padded.view(padded.shape[0] // size, size, -1, size).sum((1, 3))
        keep = max(1, round(0.2 * blocks.numel()))
        best = blocks.flatten().argsort(descending=True, stable=True)[:keep]
        wanted = {(int(b) // blocks.shape[1], int(b) % blocks.shape[1]) for b in best}
        assert {tuple(pair) for pair in selection.modules[name]["blocks"].tolist()} == wanted, name


def test_exact_statistics_choose_the_brute_force_channels(make_model):
    model, batches = make_model("llama"), samples()
    config = sparseft.S2FTConfig(importance="sylva", d_ratio=0.1, u_ratio=0.1, q_ratio=0.3)
    spec = ModelSpec.of(model)
    dense = dense_scores(model, batches)
    # S2FT's config has no levels: what it uses are the defaults, clamped to these small matrices.
    selection = sparseft.compute_selection(model, config, batches)
    exact = kfac.FactorSettings(num_partition=0)
    budget = config.budget(spec)
    scores, _ = compute_scores(model, budget.candidates, "sylva", seed=0, batches=batches, factors=exact)
    for c in budget.candidates:
        side = dense[c.module].sum(1 if c.kind == "rows" else 0)
        wanted = side[c.start : c.start + c.unit * c.count].view(c.count, c.unit).sum(1)
        assert torch.allclose(scores[c.key], wanted, rtol=2e-3), c.key
    assert set(selection.modules) == {c.module for c in budget.candidates}


def test_siblings_share_one_input_matrix(make_model, monkeypatch):
    made: Counter[int] = Counter()

    class Counting(Multilevel):
        def __init__(self, n, *args, **options):
            super().__init__(n, *args, **options)
            if self.device.type != "meta":  # whose sizes alone are asked for
                made[n] += 1

    monkeypatch.setattr(kfac, "Multilevel", Counting)
    model = make_model("llama")  # hidden 48, intermediate 80, q 72, k and v 24, two layers
    sparseft.compute_selection(model, sparseft.SylvaConfig(sparsity=0.9, block_size=8), samples(2))
    # A: q=k=v and gate=up (48), o (72), down (80); G: q (72), k, v (24), o, down (48), gate, up (80).
    assert made == {48: 2 * (2 + 2), 72: 2 * (1 + 1), 80: 2 * (1 + 2), 24: 2 * 2}


def test_batching_does_not_matter_and_the_model_is_unchanged(make_model):
    model, config = make_model("qwen2"), sparseft.SylvaConfig(sparsity=0.9, block_size=8, rank=2)
    batches = samples(3)
    length = max(b["input_ids"].shape[1] for b in batches)
    together = {
        key: torch.cat([torch.nn.functional.pad(b[key], (0, length - b[key].shape[1]), value=fill) for b in batches])
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = (sparseft.compute_selection(model, config, b) for b in (batches, [together]))
    assert one.digest() == other.digest()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_is_the_default_and_trains(make_model):
    model = make_model("llama", torch.bfloat16)
    config = sparseft.SylvaConfig(sparsity=0.9, block_size=8)
    assert config.importance == "sylva"
    selection = sparseft.compute_selection(model, config, samples(2))
    sparseft.attach(model, config, selection)
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**samples(1)[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_memory_on_top_of_the_activations_is_the_sums_the_statistics_and_one_layer(monkeypatch):
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    batch = {"input_ids": torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"]
    held = {}
    score = kfac.KroneckerFactors.score

    def noted(self, *args, **options):
        held["sums"] = tensor_bytes(self.sums.values())
        held["statistics"] = tensor_bytes(self.state()[0].values()) - held["sums"]
        return score(self, *args, **options)

    monkeypatch.setattr(kfac.KroneckerFactors, "score", noted)
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, y: y.requires_grad_(True))
    with AllocationCounter() as activations:
        model(**batch, use_cache=False).loss.backward()
    hook.remove()
    with AllocationCounter() as counter:
        sparseft.compute_selection(model, sparseft.SylvaConfig(sparsity=0.95, block_size=16), [batch])
    linears = [m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert held["sums"] == 4 * sum(weight.numel() for weight in linears)
    largest = 4 * max(weight.numel() for weight in linears)
    slack = (
        4 * batch["input_ids"].numel() * config.intermediate_size * 3
    )  # one layer's x and gradient in fp32, a sketch
    assert counter.peak <= activations.peak + held["sums"] + held["statistics"] + largest + slack
    assert slack + largest < held["sums"] / 2  # so that a second set of all gradients would not go unseen
