"""Two processes on a packed base (DDP) end with what one would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.models import wide_base
from support.ranks import Runs, run_ranks, trained
from support.running import metrics

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


@pytest.mark.slow
@pytest.mark.parametrize("quantize", PACKAGES)
def test_two_processes_on_a_packed_base(quantize: str, tmp_path: Path) -> None:
    """Losses to 1e-5 and adapters too; the model computes in fp32, so that sums in another order do not show."""
    pytest.importorskip(PACKAGES[quantize])
    runs = Runs(tmp_path, wide_base(tmp_path / "base"))
    runs.base.append(f"model.quantize={quantize}")
    methods = ["s2ft", "sylva", "lora"]
    run_ranks(tmp_path, [runs.case(method, 0) for method in methods])
    for method in methods:
        alone, together = runs.one(method), tmp_path / f"{method}-0"
        for left, right in zip(metrics(together), metrics(alone), strict=True):
            for key in ("loss", "eval_loss", "grad_norm"):
                assert left.get(key) == (pytest.approx(right[key], rel=1e-5) if key in right else None), (method, key)
        ours, theirs = trained(together), trained(alone)
        assert ours.keys() == theirs.keys()
        learnt = [name for name in ours if not name.endswith("index") and "lora_A" not in name]
        apart = sum((ours[name] - theirs[name]).square().sum() for name in learnt)
        size = sum(theirs[name].square().sum() for name in learnt)
        assert float((apart / size).sqrt()) < 1e-4, method
