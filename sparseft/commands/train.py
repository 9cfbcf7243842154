"""`sparseft train`: fine-tunes and leaves a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.commands import report
from sparseft.config import RunConfig
from sparseft.distributed import launch
from sparseft.distributed.ranks import is_main
from sparseft.files.atomic import explained
from sparseft.runs.folder import check_run_folder
from sparseft.training import checks, job
from sparseft.training.checkpoints import last_checkpoint
from sparseft.training.resume import previous_run


def run(config: RunConfig) -> dict[str, Any]:
    """Fine-tunes as configured and returns `summary.json` with the run's folder. The cheap checks come first."""
    console.clear_warnings()
    checks.check_hardware(config)
    if is_main():  # the others may find what it has made already
        check_run_folder(config.output_dir, overwrite=config.overwrite, resume=config.trainer.resume is not None)
    checks.check_trainer(config)
    checks.check_data(config)
    checks.check_excluded(config)
    checks.check_model(config)
    if launch.needed(config.hardware):
        previous_run(config)  # so that it refuses other settings before any process starts
        return launch.run("train", config)
    with launch.joined(config.hardware):
        result = job.run(config)
        if is_main():
            folder = Path(result["run"])
            with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
                report.run([str(folder)])
    return result


def render(result: dict[str, Any]) -> None:
    """What came of it, on stdout, once."""
    if not is_main():
        return
    change = ""
    if result["eval_loss_before"] is not None:
        change = f"eval loss {result['eval_loss_before']:.4f} -> {result['eval_loss_after']:.4f}, "
    share = result["trainable_parameters"] / result["total_parameters"]
    print(
        f"{result['method']}: {change}{result['trainable_parameters']:,} trainable parameters ({share:.2%} of the "
        f"model), {result['steps']} steps in {result['train_seconds']:.1f} s"
    )
    if result.get("eval_task"):
        error = "" if result["test_score_stderr"] is None else f" ± {result['test_score_stderr']:.4f}"
        print(
            f"{result['eval_task']}: {result['eval_score_before']:.4f} -> {result['eval_score_after']:.4f} on the "
            f"validation split, {result['test_score']:.4f}{error} on the test split"
        )
    print(f"run: {result['run']}")
