"""`sparseft preprocess`: calibration, importance and selection, cached for `train`."""

from __future__ import annotations

from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.distributed import launch
from sparseft.distributed.deepspeed import forget_zero
from sparseft.distributed.ranks import is_main
from sparseft.errors import UserError
from sparseft.methods import sparse_methods
from sparseft.models.spec import ModelSpec
from sparseft.selection.engine_ranks import describe_export
from sparseft.selection.selection import describe_selection
from sparseft.training import checks
from sparseft.training.prepare import prepare, select


def run(config: RunConfig) -> dict[str, Any]:
    """Computes the selection (or finds it in the cache) and returns where it lies."""
    if not config.method.sparse:
        raise UserError(f"method={config.method_name} selects nothing to preprocess: use {sparse_methods()}.")
    console.clear_warnings()
    checks.check_hardware(config)
    checks.check_data(config)
    checks.check_excluded(config)
    checks.check_model(config)
    if launch.needed(config.hardware):
        return launch.run("preprocess", config)
    with launch.joined(config.hardware):
        forget_zero()  # of an earlier run
        prepared = prepare(config)
        spec = ModelSpec.of(prepared.model).narrowed(config.method.layers)
        selected = select(config, prepared, spec)
        describe_selection(selected.selection, spec, config.method)
        describe_export(selected.selection, spec, config.method)
    return {
        "selection": str(selected.path),
        "cached": selected.cached,
        "seconds": selected.seconds,
        "trainable_parameters": selected.selection.meta["trainable_parameters"],
    }


def render(result: dict[str, Any]) -> None:
    """The selection's path on stdout, once."""
    if not is_main():
        return
    print(result["selection"])
