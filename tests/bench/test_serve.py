"""`sparseft bench serve`: what is switched, what a mixed batch answers, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseft.adapters.lifecycle import attach, save_adapter, set_adapter
from sparseft.bench import serve
from sparseft.bench.models import random_llama
from sparseft.bench.sharing import SharedWeights
from sparseft.compose.run_config import compose
from sparseft.config import BUNDLED_ROOT
from sparseft.methods.s2ft import S2FTConfig
from support.running import refused, sparseft

CPU = torch.device("cpu")
WORDS = ["bench.width=128", "bench.widths=[64,128]", "bench.batches=[1,3]", "bench.lengths=[1,4]", "bench.steps=1",
         "bench.warmup_steps=0", "sparsity=0.9", "bench.targets=[]"]  # fmt: skip


def config(*words: str) -> Any:
    return compose("bench", ["experiment=serve", *WORDS, *words])


def test_a_bench_has_every_way_at_every_point(in_tmp: Path) -> None:
    targets = ["switch s2ft / state dict <= 1e9", "mixed s2ft / lora <= 0.000001"]
    words = [*WORDS[:-1], f"bench.targets={json.dumps([t.replace('1e9', '1000000') for t in targets])}"]
    done = sparseft(in_tmp, "bench", "serve", "--json", *words, "output_dir=out", code=1)
    result = done.json
    assert json.loads((in_tmp / "out/bench.json").read_text())["points"] == result["points"]
    widths = [point for point in result["points"] if point["axis"] == "width"]
    mixed = [point for point in result["points"] if point["axis"] == "adapters"]
    assert [point["value"] for point in widths] == [64, 128]
    assert [(point["length"], point["value"]) for point in mixed] == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for point in widths:
        assert list(point["methods"]) == ["s2ft", "sylva", "lora", "merge and unmerge", "state dict"]
        assert all(row["switch_seconds"] > 0 and row["bytes"] > 0 for row in point["methods"].values())
        trained = point["methods"]["s2ft"]["trainable_parameters"]
        assert point["methods"]["s2ft"]["bytes"] == 2 * 2 * trained  # bf16, one put back and one written
        linears = 4 * point["value"] ** 2 + 3 * point["value"] * (192 if point["value"] == 64 else 384)
        assert trained == pytest.approx(0.1 * linears, rel=0.15)
        assert point["methods"]["merge and unmerge"]["bytes"] == 2 * 2 * linears
    for point in mixed:
        assert list(point["methods"]) == ["base", "s2ft", "sylva", "lora"]
        for row in point["methods"].values():
            assert row["tokens_per_second"] == pytest.approx(point["value"] * point["length"] / row["mixed_seconds"])
    met = [entry["met"] for entry in result["targets"]]
    assert met == [True, False, False, False, False]  # a switch at bench.width, each mixed batch
    assert result["targets"][2]["target"].endswith("(3 adapters, 1 token a row)")
    assert result["charts"] == ["serve-switch.svg", "serve-mixed.svg"]
    assert all((in_tmp / "out" / name).read_text().startswith("<svg") for name in result["charts"])
    assert "4 of 5 targets missed" in done.err


@pytest.mark.parametrize("entry", ["s2ft", "sylva"])
def test_a_switch_leaves_the_second_adapter_and_then_the_base(entry: str) -> None:
    base = random_llama(128, 1, torch.bfloat16, 0).eval()
    weights = SharedWeights(base)
    model = weights.copy()
    weights.claim(model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    made, _ = serve.sparse_adapters(model, config(), entry, {}, 2)
    seen = []

    def changed() -> set[str]:
        return {name for name, value in base.state_dict().items() if not torch.equal(value, before[name])}

    def timed(call: Any, _device: Any) -> float:
        seen.append({name: value.clone() for name, value in base.state_dict().items()})
        call()
        seen.append({name: value.clone() for name, value in base.state_dict().items()})
        return 1.0

    assert not changed()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serve, "seconds_of", timed)
        turn, _ = serve.sparse_switch(made, 1, CPU)
        assert turn() == 1.0
    assert not changed()
    for number, found in enumerate(seen):
        set_adapter(made, str(number))
        assert changed(), "the adapter changes nothing"
        assert all(torch.equal(value, found[name]) for name, value in base.state_dict().items())
        set_adapter(made, None)


def test_others_ways_end_where_they_say() -> None:
    weights = SharedWeights(random_llama(64, 1, torch.float32, 0).eval())
    model, _ = serve.lora_adapters(weights.copy(own=True), config(), "lora", {}, 2)
    plain = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    first = next(module for module in model.modules() if hasattr(module, "base_layer"))
    turn, facts = serve.merge_switch(model, 1, CPU)
    ended = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            serve, "seconds_of", lambda call, _device: (call(), ended.append(first.base_layer.weight.clone()))[1]
        )
        turn()
    delta = first.get_delta_weight("1")
    name = next(name for name in plain if plain[name].shape == first.base_layer.weight.shape)
    assert torch.allclose(ended[0], plain[name] + delta, atol=1e-5) and facts["bytes"] > 0
    for name, value in model.named_parameters():
        if name in plain:
            assert torch.allclose(value, plain[name], atol=1e-5)

    model, _ = serve.lora_adapters(weights.copy(), config(), "lora", {}, 1)
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_" in name}
    turn, _ = serve.hot_swap(model, 1, CPU)
    turn()
    assert all(torch.equal(p, before[n].flip(0)) for n, p in model.named_parameters() if n in before)


def test_who_cannot_be_in_a_mixed_batch_has_a_row_that_says_so(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that peft cannot mix is missing, one whose first batch raises has failed, and the others are measured."""
    plain = serve.sparse_adapters

    def made(model: Any, *rest: Any) -> Any:
        model, trained = plain(model, *rest)
        if rest[1] == "sylva" and rest[3] == 3:
            monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
        return model, trained

    monkeypatch.setattr(serve, "sparse_adapters", made)
    words = [*WORDS, 'bench.methods=[s2ft,"lora use_dora=true",sylva]', "bench.widths=[64]", "bench.lengths=[1]"]
    result = sparseft(in_tmp, "bench", "serve", "--json", *words, "output_dir=out", code=1).json
    rows = result["points"][-1]["methods"]
    assert rows["lora use_dora=true"] == {
        "missing": "'default' is a DoRA adapter, which peft cannot mix in one batch: use it alone."
    }
    assert rows["sylva"]["failed"] == "ZeroDivisionError: division by zero"
    assert rows["base"]["mixed_seconds"] > 0 and rows["s2ft"]["mixed_seconds"] > 0
    assert json.loads((in_tmp / "out/bench.json").read_text())["points"] == result["points"]


@pytest.mark.parametrize("kind", ["lora", "dora", "sparse"])
def test_adapters_of_ones_own(kind: str, in_tmp: Path) -> None:
    """PEFT's folders that others made, and ours, by PEFT's own hands and no others'."""
    source = BUNDLED_ROOT / "tiny"
    for name in ("a", "b"):
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if kind == "sparse":
            save_adapter(attach(base, S2FTConfig(importance="random")), in_tmp / name)
        else:
            config = peft.LoraConfig(r=4, use_rslora=True, use_dora=kind == "dora", target_modules="all-linear")
            peft.get_peft_model(base, config).save_pretrained(in_tmp / name)
    words = [*WORDS, "bench.adapters=[a,b]", f"model.path={source}", "model.dtype=float32"]
    done = sparseft(in_tmp, "bench", "serve", "--json", *words, "output_dir=out")
    points = done.json["points"]
    lengths = [] if kind == "dora" else [1, 4]  # which peft cannot mix
    assert [(p["axis"], p["value"], p.get("length")) for p in points] == [
        ("own", 2, None), *(("adapters", 2, length) for length in lengths)
    ]  # fmt: skip
    assert ("peft cannot mix in one batch" in done.err) == (kind == "dora")
    assert points[0]["methods"]["adapters"]["switch_seconds"] > 0
    for point in points[1:]:
        for name in ("base", "adapters"):
            row = point["methods"][name]
            assert row["tokens_per_second"] == pytest.approx(2 * point["length"] / row["mixed_seconds"])


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("bench.adapters=[nosuch]", ["bench.adapters: nosuch: no such folder"]),
        ("bench.adapters=[/]", ["no adapter and no finished run"]),
        ("bench.methods=[full]", ["'full' has no adapter"]),
        ("bench.methods=[floor,s2ft]", ["'floor' has no adapter"]),
        ("bench.shape=llama-7b", ["bench.width and bench.depth"]),
        ("bench.widths=[100]", ["multiple of 64"]),
        ("bench.batches=[0]", ["bench.batches"]),
        ("bench.lengths=[9000]", ["8192"]),
        ("bench.targets=['passes s2ft / lora <= 1']", ["unknown quantity 'passes'"]),
        ("bench.targets=['switch s2ft / merge <= 1']", ["no contender 'merge'", "merge and unmerge"]),
    ],
)
def test_wrong_settings_are_refused_before_work(word: str, parts: list[str], in_tmp: Path) -> None:
    message = refused(in_tmp, "bench", "serve", *WORDS[:-1], word)
    assert all(part in message for part in parts), message
    assert not list(in_tmp.iterdir())
