"""The main job on what the package bundles: preprocess, evaluate, train with Sylva, evaluate again, report.

`make quickstart`, or `python -m sparseft.cli.quickstart [override…]`. Offline, on two CPU cores, in under three
minutes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

# A model this small is faster on one core than when two wait for each other; to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from sparseft import console
from sparseft.cli.outcome import execute
from sparseft.commands import eval, preprocess, report, train
from sparseft.compose.run_config import compose
from sparseft.files.atomic import move
from sparseft.runs.folder import ADAPTER, BEFORE

EXPERIMENT = "experiment=quickstart"
LEARNT = "commonsense"  # the skill that training adds
KEPT = "mmlu"  # what the base can do already: does it forget?


def main(overrides: list[str]) -> int:
    """Runs the five steps and returns the exit code."""
    start = time.perf_counter()
    with console.once(""):  # all five steps are about the same run
        outcome = execute(lambda: quickstart(overrides), guard_stdout=False)
    if outcome.code:
        console.error(outcome.message)
        return outcome.code
    tell(outcome.result, time.perf_counter() - start)
    return 0


def say(number: int, text: str) -> None:
    """The heading of a step."""
    console.log(f"\n[{number}/5] {text}")


def quickstart(overrides: list[str]) -> dict[str, Any]:
    """The five steps; returns what `tell` sums up."""
    words = [EXPERIMENT, *overrides]
    say(1, "preprocess: which 8×8 blocks of the weights matter most for the new task?")
    selection = preprocess.run(compose("preprocess", words))

    say(2, f"the bundled base model before training, on {LEARNT} (new to it) and {KEPT} (learnt already)")
    before = eval.run(compose("eval", words), tasks=[LEARNT, KEPT], base=True)

    say(3, "train those blocks, nothing else")
    trained = train.run(compose("train", words))
    run = Path(trained["run"])

    say(4, "the same questions after training")
    after = eval.run(compose("eval", [*words, "eval.compare_base=false"]), tasks=[LEARNT, KEPT], run=str(run))
    keep_before(before["files"], run / BEFORE)

    say(5, "one page that shows it all")
    page = report.run([str(run)])
    return {"selection": selection, "before": before, "train": trained, "after": after, "report": page["report"]}


def keep_before(files: list[str], folder: Path) -> None:
    """Moves the base model's results into the run, beside the trained model's."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in map(Path, files):
        move(file, folder)
    for emptied in (Path(files[0]).parent, Path(files[0]).parent.parent):  # outputs/eval-…/eval
        if not any(emptied.iterdir()):
            emptied.rmdir()


def tell(result: dict[str, Any], seconds: float) -> None:
    """What happened and where it lies, on stdout."""
    trained = result["train"]
    share = trained["trainable_parameters"] / trained["total_parameters"]
    print(
        f"\nTrained {trained['trainable_parameters']:,} of {trained['total_parameters']:,} weights ({share:.1%}) with "
        f"{trained['method']} in {trained['steps']} steps, {trained['train_seconds']:.0f} s."
    )
    rows = []
    for name in (LEARNT, KEPT):
        old, new = result["before"]["tasks"][name], result["after"]["tasks"][name]
        change = new["accuracy"] - old["accuracy"]
        rows.append([name, f"{old['accuracy']:.1%}", f"{new['accuracy']:.1%}", f"{100 * change:+.1f}", new["samples"]])
    rows.append(["eval loss", f"{trained['eval_loss_before']:.3f}", f"{trained['eval_loss_after']:.3f}", "", ""])
    console.table("Held-out accuracy", ["", "before", "after", "points", "questions"], rows)
    adapter = console.size(sum(file.stat().st_size for file in (Path(trained["run"]) / ADAPTER).iterdir()))
    print(
        f"\nrun folder  {trained['run']}   (adapter/ is {adapter})"
        f"\nreport      {result['report']}"
        f"\nselection   {result['selection']['selection']}"
        f"\n\nAll of it took {seconds:.0f} s. Next: sparseft train --help, or with your own model and data:"
        "\n  sparseft train model.path=FOLDER dataset=json dataset.train_path=FILE method=sylva sparsity=0.984"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
