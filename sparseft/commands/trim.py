"""`sparseft trim`: a run's adapter cut back until it forgets no more than a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.files.atomic import name_leftovers
from sparseft.runs.folder import check_writable
from sparseft.training import checks
from sparseft.trim.job import Trimming


def run(
    config: RunConfig,
    *,
    folder: str | None,
    forget: float,
    source: str,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Trims the adapter of the run in `folder` (default: the latest); returns where it lies and what came of it.

    forget: nats a token of the source text. out: a new folder; None: beside the run.
    """
    console.clear_warnings()
    checks.check_one_process(config, "trim")
    trimming = Trimming.find(folder, config, overrides, forget, source)
    where = Path(out).expanduser() if out is not None else beside(trimming.target.folder, forget)
    if where.exists():
        raise UserError(f"--out {where}: it is there already; name a new folder, or remove it.")
    check_writable(where, "--out")
    name_leftovers(where)
    console.log(f"trimming {trimming.target.what} to {forget:g} nats a token of {source}")
    model, outcome = trimming.run()
    trimming.write(model, outcome, where)
    return {"path": str(where), "of": trimming.target.what, **outcome}


def beside(run: Path | None, forget: float) -> Path:
    """Where the trimmed adapter of a run lies, unless another place is named."""
    assert run is not None
    run = run.resolve() if run.name in ("", ".", "..") else run
    return run.with_name(f"{run.name}-trim-{forget:g}")


def render(result: dict[str, Any]) -> None:
    """Losses of the base, as trained and as trimmed; then what was done, and where it lies."""
    source, target = result["source"], result["target"]
    rows = [
        [name, *(f"{part[f'loss_{when}']:.4f}" for when in ("base", "before", "after"))]
        for name, part in (("source", source), ("target", target))
    ]
    title = f"Loss on {source['file']} (source) and {target['data']} (target)"
    console.table(title, ["loss", "base", "as trained", "trimmed"], rows)
    for line in said(result):
        print(line)
    print(f"adapter written to {result['path']}: sparseft eval TASK --adapter {result['path']}")


def said(result: dict[str, Any]) -> list[str]:
    """What trimming came to, in sentences: of the command and of a run's summary."""
    source, target = result["source"], result["target"]
    error = "" if source["stderr"] is None else f" ± {source['stderr']:.4f}"
    forgets = f"{source['forgetting']:.4f}{error} nats a token of {source['file']}"
    if not result["trimmed"]:
        return [f"forgets {forgets}: within the budget of {result['budget']:g} as it is, so nothing was changed"]
    alike = result["one_factor"]
    return [
        f"forgets {forgets} (as trained {source['forgetting_before']:.4f}, budget {result['budget']:g})",
        f"target loss {target['loss_before']:.4f} -> {target['loss_after']:.4f}{_kept(target, target['loss_after'])}",
        f"{result['units']:,} units, {result['dropped']:,} dropped, scaled by {result['mean_factor']:.2f} on average; "
        f"one factor for all, {alike['factor']:.2f}, would leave the target at {alike['target_loss']:.4f}"
        f"{_kept(target, alike['target_loss'])}",
    ]


def _kept(target: dict[str, Any], loss: float) -> str:
    """What a loss leaves of training's gain; nothing where there was none."""
    gained = target["loss_base"] - target["loss_before"]
    return f" ({100 * (target['loss_base'] - loss) / gained:.0f} % of what was gained)" if gained > 0 else ""
