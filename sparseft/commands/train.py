"""`sparseft train`: fine-tunes and leaves a run folder."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from sparseft import console
from sparseft.commands import report
from sparseft.config import RunConfig
from sparseft.distributed import env, launch
from sparseft.distributed.ranks import from_main, is_main
from sparseft.errors import UserError
from sparseft.files.atomic import explained, write_json
from sparseft.models.loading import load_tokenizer
from sparseft.runs.folder import SUMMARY, check_run_folder, load_summary
from sparseft.runs.lock import Lock
from sparseft.training import checks
from sparseft.training.checkpoints import last_checkpoint
from sparseft.training.job.run import run as train
from sparseft.training.resume import previous_run


def run(config: RunConfig) -> dict[str, Any]:
    """Fine-tunes as configured and returns `summary.json` with the run's folder. The cheap checks come first."""
    console.clear_warnings()
    checks.check_hardware(config)
    if not env.started():
        check_folder(config)
    checks.check_trainer(config)
    checks.check_data(config)
    checks.check_excluded(config)
    checks.check_model(config)
    check_trim(config)
    if launch.needed(config.hardware):
        previous_run(config)  # so that it refuses other settings before any process starts
        try:
            return launch.run("train", config)
        except launch.ResultLost:
            if config.output_dir is None:  # only the processes knew which folder they made
                raise
            folder = Path(config.output_dir).expanduser()
            return load_summary(folder) | {"run": str(folder)}
    with launch.joined(config.hardware), Lock() as lock:
        if env.started():
            # By one for all, once they have met: before, the others would wait for one that has ended, and one that
            # comes late would find what the first has made already.
            from_main(lambda: check_folder(config))
        result = train(config, lock)
        if config.trainer.forget_budget is not None:
            result |= {"trim": trim(config, result)}
        if is_main():
            folder = Path(result["run"])
            with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
                report.run([str(folder)])
    return result


def check_folder(config: RunConfig) -> None:
    """Refuses an `output_dir` that this run cannot use."""
    check_run_folder(config.output_dir, overwrite=config.overwrite, resume=config.trainer.resume is not None)


def check_trim(config: RunConfig) -> None:
    """Refuses `trainer.forget_budget` where it could not be kept in the end."""
    budget, source = config.trainer.forget_budget, config.trainer.forget_source
    if budget is None and source is None:
        return
    if budget is None or source is None:
        missing, given = ("forget_source=FILE", "forget_budget") if budget else ("forget_budget=NATS", "forget_source")
        raise UserError(f"trainer.{given} needs trainer.{missing} beside it.")
    from sparseft.trim import job as trimming  # brings the evaluation with it, which other runs need not wait for

    if not config.method.separable:
        raise UserError(f"trainer.forget_budget={budget:g}: {trimming.inseparable(config.method_name)}")
    if env.processes(config.hardware) > 1 or config.hardware.zero_stage:
        raise UserError(
            f"trainer.forget_budget={budget:g}: a run trims in one process; leave it out, and trim the finished run: "
            f"sparseft trim RUN --forget {budget:g} --source {source}."
        )
    trimming.check(budget, source, "trainer.forget_source")
    trimming.source_data(config, source, load_tokenizer(config.model), "trainer.forget_source")


def trim(config: RunConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Cuts the finished run's adapter back to `trainer.forget_budget`; what came of it, which the summary has too.

    Whatever ends this leaves the run as it was trained.
    """
    folder = result["run"]
    gc.collect()  # what trained may be as large as the device's memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    budget, source = config.trainer.forget_budget, config.trainer.forget_source
    assert budget is not None and source is not None
    from sparseft.trim import job as trimming

    try:
        trusted = f"model.trust_remote_code={config.model.trust_remote_code}"  # a folder does not decide it, this does
        one = trimming.Trimming.find(folder, config, [trusted], budget, source)
        model, outcome = one.run()
        if outcome["trimmed"]:
            one.replace(model, outcome)
    except BaseException:
        console.log(f"trim: not done; the run {folder} is finished, and its adapter is as it was trained")
        raise
    summary = load_summary(folder) | {"trim": outcome}
    write_json(Path(folder) / SUMMARY, summary)
    return outcome


def render(result: dict[str, Any]) -> None:
    """What came of it, on stdout, once."""
    if not is_main():
        return
    change = ""
    if result["eval_loss_before"] is not None:
        change = f"eval loss {result['eval_loss_before']:.4f} -> {result['eval_loss_after']:.4f}, "
    if result.get("eval_margin_after") is not None:
        change += f"margin {result['eval_margin_before']:.4f} -> {result['eval_margin_after']:.4f}, "
    if result.get("eval_accuracy_after") is not None:
        change += f"accuracy {result['eval_accuracy_before']:.4f} -> {result['eval_accuracy_after']:.4f}, "
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
    if "trim" in result:
        from sparseft.commands.trim import said

        for line in said(result["trim"]):
            print(f"trim: {line}")
    print(f"run: {result['run']}")
