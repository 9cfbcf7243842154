"""`sparseft bench`: side-by-side measurements, as a table and `bench.json`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.commands import checks
from sparseft.config import RunConfig
from sparseft.errors import UserError


def run(config: RunConfig, what: str = "train") -> dict[str, Any]:
    """Runs the benchmark `what` and writes `bench.json` into `output_dir` (default `outputs/bench-<date>-<time>`)."""
    from sparseft import runs
    from sparseft.compose import to_yaml
    from sparseft.modeling import resolve_device

    console.clear_warnings()
    checks.check_hardware(config)
    if config.output_dir and Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise UserError(f"output_dir={config.output_dir}: is a file, not a folder.")
    result = importlib.import_module(f"sparseft.bench.{what}").run(config)
    result["environment"] = runs.environment(str(resolve_device(config.hardware.device)), result["dtype"], 1)
    folder = Path(config.output_dir) if config.output_dir else runs.new_folder(f"bench-{runs.timestamp()}")
    folder.mkdir(parents=True, exist_ok=True)
    result["path"] = str(folder / "bench.json")
    runs.write_json(folder / "bench.json", result)
    runs.write_text(folder / "config.yaml" if not runs.is_run(folder) else folder / "bench.yaml", to_yaml(config))
    return result


def render(result: dict[str, Any]) -> None:
    """The table on stdout."""
    references = [name for name in ("floor", "lora", "full") if name in result["methods"]]
    rows = []
    for name, entry in result["methods"].items():
        rows.append(
            [
                name,
                f"{1000 * entry['step_seconds']:.1f}",
                *(f"{entry['ratio_to'][other]:.2f}" for other in references),
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['peak_memory_bytes'] / 2**20:,.1f}",
                f"{entry['saved_bytes'] / 2**20:,.1f}",
                f"{entry['trainable_parameters']:,}",
            ]
        )
    title = (
        f"Training step: {result['model']}, {result['parameters']:,} parameters, {result['dtype']} on "
        f"{result['device']}, {result['batch_size']} x {result['length']} tokens, median of {result['steps']}"
    )
    ratios = [f"÷ {other}" for other in references]
    columns = ["method", "step ms", *ratios, "tokens/s", "peak MiB", "saved MiB", "trainable"]
    console.table(title, columns, rows)
    print(f"bench: {result['path']}")
