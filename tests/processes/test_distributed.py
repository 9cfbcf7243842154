"""Two processes end with what one would have: the same losses and the same adapter, for every method and ZeRO stage."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparseft.data.sampling import PaddedDataset, PaddedSampler
from sparseft.training.checkpoints import write_manifest
from support.ranks import COMMON, METHODS, TWO, Runs, Stage, run_ranks, sharing, split, trained
from support.running import metrics, refused, sparseft, summary, write_data

RESELECTED = ["method.reselect_steps=2", "method.importance=gradient", "method.num_samples=6"]
CALIBRATED = [*RESELECTED, "method.reselect_by=calibration"]
METHODS |= {f"{name}, reselected": [*METHODS[name], *RESELECTED] for name in ("s2ft", "sylva")}
METHODS["s2ft, reselected, averaged"] = [*METHODS["s2ft"], *RESELECTED, "trainer.average=ema:0.5"]
METHODS |= {f"{name}, reselected anew": [*METHODS[name], *CALIBRATED] for name in ("s2ft", "permuted", "sylva")}
# What two processes train as one does to 1e-5: not weights in bf16, and no re-selection where ZeRO has sharded them.
EVERY = [(method, stage) for method in METHODS for stage in (*range(4), "fsdp")
         if method != "bf16" and (stage not in (3, "fsdp") or "reselected" not in method)]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"), model_folder())


def difference(run: Path, other: Path, base: dict[str, torch.Tensor] | None = None) -> float:
    """The norm of the difference of two runs' adapters, relative to what they have learnt.

    Of a whole model that is what differs from the `base`, of LoRA the factor that starts at zero.
    """
    left, right = in_one_order(trained(run)), in_one_order(trained(other))
    assert left.keys() == right.keys()
    for name in left:
        if name.endswith("index"):
            assert torch.equal(left[name], right[name]), name
    apart = sum((left[name] - right[name]).square().sum() for name in left)
    learnt = [name for name in left if not name.endswith("index") and ("lora_" not in name or "lora_B" in name)]
    size = sum((left[name] - (base[name] if base else 0)).square().sum() for name in learnt)
    return float((apart / size).sqrt())


def in_one_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What trains rows or columns, by their numbers: `layout=permuted` keeps another order, but not in shards."""
    ordered = dict(tensors)
    for name, index in tensors.items():
        if name.endswith(("rows.index", "columns.index")):
            place, delta = index.argsort(), name.replace(".index", ".delta")
            ordered |= {name: index[place], delta: tensors[delta].index_select(int("columns" in name), place)}
    return ordered


def assert_same_losses(run: Path, other: Path) -> None:
    for left, right in zip(metrics(run), metrics(other), strict=True):
        assert left["step"] == right["step"]
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert left.get(key) == (pytest.approx(right[key], rel=1e-5) if key in right else None), key


def check(runs: Runs, cases: list[tuple[str, Stage]], model: Path) -> None:
    """Holds each (method, stage), run in two processes, against one process."""
    found = {}
    for method, stage in cases:
        alone, together = runs.one(method), runs.folder / f"{method}-{stage}"
        assert_same_losses(alone, together)
        base = {name: value.double() for name, value in load_file(model / "model.safetensors").items()}
        found[method, stage] = difference(alone, together, base if method == "full" else None)
    print("".join(f"\n{method:20} {sharing(stage)}: {value:.1e}" for (method, stage), value in found.items()))
    assert all(value < 1e-5 for value in found.values()), found


EVERYDAY = [("s2ft", 0), ("sylva", 0), ("lora", 0), ("sylva", 1), ("s2ft", 2), ("s2ft", 3), ("sylva", 3), ("lora", 3),
            ("s2ft, reselected", 0), ("s2ft, reselected, averaged", 2),
            ("s2ft", "fsdp"), ("sylva", "fsdp"), ("dora", "fsdp"), ("full", "fsdp")]  # fmt: skip


SEALED = [("sylva", 1), ("s2ft", 3), ("full", "fsdp")]
# A run of two processes in two sittings, packed and with its best adapter kept, and the same run in one.
SITTINGS = [
    *("dataset.packing=true", "trainer.max_length=48", "trainer.scheduler=constant", "trainer.eval_steps=1"),
    *("trainer.save_steps=1", "method.dropout=0.2", "trainer.keep_best=true"),
]
CONTINUED = [0, 3, "fsdp"]  # stage 2 resumes as stage 1 does, by the same optimizer: `SEALED`


def sittings(runs: Runs, stage: Stage) -> list[dict[str, Any]]:
    cases = []
    for name, *words in (("whole",), ("cut", "trainer.max_steps=2"), ("cut", "trainer.resume=auto")):
        case = runs.case("lora", stage, *split(1, 2), *SITTINGS, f"output_dir={name}-{stage}", *words)
        cases.append(case | {"name": f"{name}-{stage}"})
    return cases


def grown(runs: Runs, stage: Stage) -> list[dict[str, Any]]:
    """A run that ends after two steps, as its schedule has it, and goes on to four."""
    words = ["trainer.scheduler=cosine", "trainer.warmup_steps=1", f"output_dir=grown-{stage}", "trainer.resume=auto"]
    cases = [runs.case("s2ft", stage, *split(1, 2), *words, f"trainer.max_steps={steps}") for steps in (2, 4)]
    return [case | {"name": f"grown-{stage}"} for case in cases]


PREPROCESS = [*METHODS["sylva"], *split(2, 2), "method.num_samples=5", "seed=3"]  # 3 samples for one, 2 for the other


@pytest.fixture(scope="module")
def together(runs: Runs) -> Runs:
    """The everyday cases, all run by the same two processes."""
    words = [*runs.base, *PREPROCESS, TWO, "cache_dir=cache-2"]
    case = {"name": "preprocess", "command": "preprocess", "overrides": words}
    saving = ["trainer.save_steps=3", "trainer.save_total_limit=9"]
    saved = [*SEALED, ("s2ft", 0)]
    cases = [runs.case(method, stage, *(saving if (method, stage) in saved else [])) for method, stage in EVERYDAY]
    continued = [case for stage in CONTINUED for case in (*sittings(runs, stage), *grown(runs, stage))]
    bad = [bad_case(runs, *each) for each in (*BAD, *BAD_IN_A_ROW)]
    best = [best_case(runs, "s2ft", stage) for stage in (0, 3, "fsdp")]
    (runs.folder / "a-file").write_text("no folder")
    uncached = runs.case("s2ft", 0, f"cache_dir={runs.folder / 'a-file'}") | {"name": "uncached", "refused": True}
    (runs.folder / "linked").mkdir()
    (runs.folder / "linked" / "config.yaml").write_text("seed: 0\n")
    (runs.folder / "linked" / "samples.jsonl").symlink_to(runs.folder / "elsewhere")
    linked = runs.case("s2ft", 0, "output_dir=linked", "trainer.resume=auto") | {"name": "linked", "refused": True}
    run_ranks(runs.folder, [uncached, linked, case, *cases, *continued, *bad, *best], seconds=1200)
    return runs


def test_two_processes_train_what_one_trains(together: Runs, model_folder: Any) -> None:
    check(together, EVERYDAY, model_folder())


BAD = [("s2ft", 0, "loss"), ("s2ft", 1, "gradient"), ("s2ft", 3, "value"), ("s2ft", "fsdp", "gradient"),
       ("bf16", 0, "loss"), ("bf16", 2, "loss"), ("bf16", "fsdp", "value")]  # fmt: skip
BAD_IN_A_ROW = [("s2ft", 2, "value", 5, 6, 7, 8, 9), ("s2ft", 3, "loss", 1, 3)]  # micro-steps, of which a step has two
EVERY_BAD = [(method, stage, what) for method in ("s2ft", "bf16") for stage in (*range(4), "fsdp")
             for what in ("loss", "value", "gradient")]  # fmt: skip


def bad_case(runs: Runs, method: str, stage: Stage, what: str, *micro_steps: int) -> dict[str, Any]:
    """A run with bad micro-steps in the last process: the fourth, or those given, after which it is to fail."""
    name = f"bad-{method}-{stage}-{what}" + ("-all" if micro_steps else "")
    words = ["trainer.save_steps=1", "trainer.save_total_limit=9", "trainer.max_bad_steps=2"] if micro_steps else []
    case = runs.case(method, stage, *words, f"output_dir={name}")
    return case | {"name": name, "bad": micro_steps or [4], "what": what, "refused": bool(micro_steps)}


def check_bad(runs: Runs, cases: list[tuple[str, Stage, str]]) -> None:
    """One process has a step that is not finite: no process updates anything, and the schedule goes on. As without
    DeepSpeed, weights and moments: these make the steps that follow."""
    for method, stage, what in cases:
        plain, sharded = runs.folder / f"bad-{method}-0-loss", runs.folder / f"bad-{method}-{stage}-{what}"
        rounding = 1e-5 if method != "bf16" else 0.02  # of the weights that train, or of what is summed into them
        for left, right in zip(metrics(plain), metrics(sharded), strict=True):
            bad = 1 if left["step"] == 2 and "loss" in left else None
            assert left.get("bad_steps") == right.get("bad_steps") == bad
            for key in ("loss", "eval_loss", "learning_rate"):
                known = pytest.approx(left[key], rel=rounding) if left.get(key) is not None else None
                assert right.get(key) == known, (key, sharded)
        assert all(value.isfinite().all() for value in trained(sharded).values())
        assert difference(plain, sharded) < rounding, sharded


def test_a_bad_step_is_the_same_under_deepspeed(together: Runs) -> None:
    check_bad(together, BAD)
    assert difference(together.folder / "bad-s2ft-0-loss", together.folder / "s2ft-0") > 1e-3


def test_bad_steps_in_a_row_end_a_run_under_deepspeed(together: Runs) -> None:
    """With exit code 1's error, which names the checkpoint to go back to, or says that there is none."""
    ended, began = (json.loads((together.folder / f"bad-{name}-all.json").read_text()) for name in
                    ("s2ft-2-value", "s2ft-3-loss"))  # fmt: skip
    assert "not finite in the steps 3 to 4 (trainer.max_bad_steps=2), which updated nothing" in ended["message"]
    run = Path("bad-s2ft-2-value-all", "checkpoints")
    assert ended["last_checkpoint"] == str(run / "checkpoint-1")  # that of step 2 never gave a finite loss
    assert os.listdir(together.folder / "bad-s2ft-3-loss-all" / "checkpoints") == []
    assert "not finite in the steps 1 to 2" in began["message"] and began["last_checkpoint"] is None
    assert began["message"].endswith("There is no good checkpoint of before, as none was saved yet.")


def test_what_the_first_process_refuses_all_refuse(together: Runs) -> None:
    """It alone looks at the cache and into the run's folder: the others, which would wait for it, end with the same
    sentence and go on here."""
    message = json.loads((together.folder / "uncached.json").read_text())["message"]
    assert message.startswith("cache_dir=") and message.endswith("a-file is no folder."), message
    message = json.loads((together.folder / "linked.json").read_text())["message"]
    assert "'linked/samples.jsonl' is a link " in message, message


@pytest.mark.slow
def test_every_way_to_be_bad(tmp_path: Path, model_folder: Any) -> None:
    runs = Runs(tmp_path, model_folder())
    run_ranks(runs.folder, [bad_case(runs, *case) for case in EVERY_BAD])
    check_bad(runs, EVERY_BAD)


# ---- the best evaluation, and answers, of a model in shards ----


def best_case(runs: Runs, method: str, stage: Stage = 3) -> dict[str, Any]:
    """A run in shards judged by answers that are generated. Hardly one is right, so mostly the first step that counts
    stays best: the second."""
    questions = runs.folder / "questions" / "boolq"
    if not questions.exists():
        questions.mkdir(parents=True)
        for split in ("validation", "test"):
            asked = [f"{split}: is {a} more than {b}?" for a in range(2) for b in range(2)]
            rows = [{"instruction": text, "input": "", "output": "true", "answer": "true"} for text in asked]
            (questions / f"{split}.json").write_text(json.dumps(rows))
    words = ["trainer.eval_steps=2", "trainer.save_steps=1", "trainer.save_total_limit=9", "trainer.keep_best=true"]
    words += [
        "trainer.best_after=0.4",
        f"trainer.learning_rate={3e-2 if method != 'full' else 2e-3}",
        "trainer.eval_task=boolq",
        *asking(runs),
        f"output_dir=best-{method}-{stage}",
    ]
    return runs.case(method, stage, *words) | {"name": f"best-{method}-{stage}"}


def asking(runs: Runs) -> list[str]:
    return [f"eval.data_dir={runs.folder / 'questions'}", "eval.limit=3", "eval.max_new_tokens=32"]


def check_best(runs: Runs, method: str, stage: Stage = 3) -> None:
    """The adapter left is that of the best evaluation, in the file and in the sharded model that answered the test's
    questions: the answers are those that one process reads out of the file, and not those of the last step."""
    run = runs.folder / f"best-{method}-{stage}"
    chosen = summary(run)["best_step"]
    assert chosen in (2, 4)  # evaluated, and not the last
    left, best, last = (trained(at) for at in (run, *(run / f"checkpoints/checkpoint-{n}" for n in (chosen, 5))))
    assert all(torch.equal(left[name], best[name]) for name in left)
    assert not all(torch.equal(left[name], last[name]) for name in left)
    base = [f"model.{'path' if method != 'full' else 'tokenizer'}={runs.model}"]
    for name, adapter in (("again", run / "adapter"), ("last", run / "checkpoints" / "checkpoint-5" / "adapter")):
        words = [*asking(runs), *base, "model.dtype=float32", "hardware=cpu", f"output_dir={run}-{name}"]
        sparseft(runs.folder, "eval", "boolq", "--adapter", adapter, *words)
    answers, again, after = (
        [json.loads(line)["response"] for line in (folder / "eval" / "boolq.samples.jsonl").read_text().splitlines()]
        for folder in (run, Path(f"{run}-again"), Path(f"{run}-last"))
    )
    assert answers == again != after and len(answers) == 3


@pytest.mark.parametrize("stage", [3, "fsdp"])
def test_the_best_adapter_of_a_model_in_shards(together: Runs, stage: Stage) -> None:
    check_best(together, "s2ft", stage)


def test_every_process_knows_the_score(together: Runs) -> None:
    """Though the first one alone has asked: of several machines each one's says what came of the run."""
    first, second = (json.loads((together.folder / f"best-s2ft-0{of}.json").read_text()) for of in ("", "-rank1"))
    assert first["test_score"] == second["test_score"] is not None
    assert first["test_score_stderr"] == second["test_score_stderr"]


@pytest.mark.slow
def test_the_best_of_every_method_in_shards(tmp_path: Path, model_folder: Any) -> None:
    runs = Runs(tmp_path, model_folder())
    methods = ["permuted", "sylva", "lora", "dora", "full"]
    cases = [(method, stage) for method in methods for stage in (3, "fsdp")]
    run_ranks(runs.folder, [best_case(runs, *case) for case in cases])
    for case in cases:
        check_best(runs, *case)


@pytest.mark.slow
def test_compiled_in_two_processes(runs: Runs) -> None:
    """Compiled, in two processes, against one that computes eagerly."""
    case = runs.case("s2ft", 0, "trainer.compile=model", "output_dir=compiled")
    run_ranks(runs.folder, [case | {"name": "compiled"}], seconds=1200)
    assert difference(runs.one("s2ft"), runs.folder / "compiled") < 1e-5
    assert_same_losses(runs.one("s2ft"), runs.folder / "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, "fsdp"])
def test_scores_of_a_model_in_shards_are_those_of_one_process(tmp_path: Path, stage: Stage) -> None:
    words = ["method=s2ft", "sparsity=0.9", "dataset.max_examples=24", "dataset.eval_fraction=0.2", "hardware=cpu"]
    words += ["trainer.max_steps=4", "trainer.eval_steps=2", "trainer.max_length=64", "trainer.learning_rate=1e-2"]
    words += ["trainer.warmup_steps=0", "trainer.eval_task=mmlu", "eval.limit=10", "model.dtype=float32"]
    words += ["trainer.sample_prompts=[Name a colour]", "trainer.report_to=tensorboard"]
    sparseft(tmp_path, "train", *words, *split(2, 4), "output_dir=alone")
    sharded = [*words, *split(2, 2), "output_dir=sharded", TWO, sharing(stage)]
    run_ranks(tmp_path, [{"name": "sharded", "command": "train", "overrides": sharded}])
    alone, together = (
        [(line["step"], line["eval_score"]) for line in metrics(tmp_path / name) if "eval_score" in line]
        for name in ("alone", "sharded")
    )
    assert alone == together and [step for step, _ in alone] == [0, 2, 4] and any(score for _, score in alone)
    assert summary(tmp_path / "alone")["test_score"] == summary(tmp_path / "sharded")["test_score"]
    answers = [(tmp_path / name / "samples.jsonl").read_text() for name in ("alone", "sharded")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 3
    assert len(list((tmp_path / "sharded" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("stage", CONTINUED)
def test_two_processes_go_on_where_they_stopped(together: Runs, stage: Stage) -> None:
    whole, cut = (together.folder / f"{name}-{stage}" for name in ("whole", "cut"))
    left, right = trained(whole), trained(cut)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    timing = {"tokens_per_second", "step_seconds", "memory_gib"}
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in metrics(run)] for run in (whole, cut)]
    assert lines[0] == lines[1] and lines[0][-1]["step"] == 5
    assert (cut / "checkpoints" / "checkpoint-5" / "rng_state_1.pth").is_file()
    for key in ("tokens", "train_loss", "eval_loss_after", "best_step"):
        assert summary(whole).get(key) == summary(cut).get(key), key


@pytest.mark.parametrize("stage", CONTINUED)
def test_a_longer_run_is_on_its_new_schedule(together: Runs, stage: Stage) -> None:
    lines = metrics(together.folder / f"grown-{stage}")
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    wanted = [1e-3 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)]  # of four steps, after the warm-up
    assert rates == pytest.approx({1: 0.0, 2: 1e-3, 3: wanted[1], 4: wanted[2]})


@pytest.mark.slow
def test_a_reselected_run_goes_on_where_it_stopped(tmp_path: Path, model_folder: Any) -> None:
    """With entries parked at step 2, stopped at step 3 and continued under ZeRO: bit for bit the whole run's."""
    runs, cases = Runs(tmp_path, model_folder()), []
    for stage in (1, 2):
        for name, *words in (("whole",), ("cut", "trainer.max_steps=3"), ("cut", "trainer.resume=auto")):
            words = ["trainer.scheduler=constant", "trainer.save_steps=3", f"output_dir={name}-{stage}", *words]
            cases.append(runs.case("s2ft, reselected", stage, *words) | {"name": f"{name}-{stage}"})
    run_ranks(tmp_path, cases)
    for stage in (1, 2):
        left, right = trained(tmp_path / f"whole-{stage}"), trained(tmp_path / f"cut-{stage}")
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_is_continued_with_as_many_examples_a_step(together: Runs, tmp_path: Path) -> None:
    """With dropout the random numbers are others, but the same ones each time, and a line says so."""
    runs = [tmp_path / "cut", tmp_path / "again"]
    for run in runs:
        shutil.copytree(together.folder / "cut-0", run)
        words = [*sittings(together, 0)[-1]["overrides"], f"output_dir={run}", "trainer.max_steps=6"]
        alone = "hardware.num_processes=1"
        assert refused(together.folder, "train", *words, alone).startswith(
            f"a step would be 2 examples in 1 processes, and the run in '{run}' was started with 4 in 2: "
        )
        done = sparseft(together.folder, "train", *words, alone, "trainer.gradient_accumulation=4")
        assert "checkpoint-5" in done.err and summary(run)["steps"] == 6
        assert done.err.count("checkpoint-5 was saved by 2 processes and goes on in 1, so random numbers") == 1
    left, right = map(trained, runs)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("method", "stage"), [("s2ft", 0), ("full", "fsdp")])
def test_continued_in_fewer_processes_it_ends_the_same(
    together: Runs, tmp_path: Path, model_folder: Any, method: str, stage: Stage
) -> None:
    """FSDP2's moments, too, lie in one file, which one process takes up whole."""
    run = tmp_path / "run"
    shutil.copytree(together.folder / f"{method}-{stage}", run)
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    words = [*together.case(method, stage)["overrides"], *split(2, 4), f"output_dir={run}", "trainer.resume=auto"]
    words += ["hardware.num_processes=1", "hardware.fsdp=false"]
    done = sparseft(together.folder, "train", *words, "trainer.save_steps=3")
    assert "resume: " in done.err and "checkpoint-3" in done.err
    base = {name: value.double() for name, value in load_file(model_folder() / "model.safetensors").items()}
    assert difference(together.one(method), run, base if method == "full" else None) < 1e-5
    assert_same_losses(together.one(method), run)


@pytest.mark.parametrize("files", [["rng_state_0.pth", "rng_state_1.pth"], []])
def test_other_processes_draw_other_random_numbers(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparseft.training import distributed_trainer

    for name in files:
        (tmp_path / name).touch()
    places = [(0, 1), (0, 4), (1, 4), (3, 4)]
    drawn = set()
    for rank, world in [*places, *places]:
        monkeypatch.setattr(distributed_trainer, "rank_and_world", lambda at=(rank, world): at)
        for step in (3, 4):
            assert distributed_trainer.draw_anew(tmp_path, 0, step)
            drawn.add((torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert len(drawn) == 8  # a place and a step have numbers of their own, the same ones each time
    assert capsys.readouterr().err.count("drawn anew") == 8  # said by the first process alone
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed_trainer, "rank_and_world", lambda: (1, 2))
    before = torch.get_rng_state()
    assert not distributed_trainer.draw_anew(tmp_path, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (0, ["hardware.zero_stage=2"], "hardware.zero_stage=2: the run in "),
        (3, ["hardware.zero_stage=0"], "hardware.zero_stage=0: the run in "),
        (3, ["hardware.num_processes=1", "trainer.gradient_accumulation=4"], "hardware.num_processes=1: the run in "),
        (3, ["hardware.zero_stage=1"], "hardware.zero_stage=1: the run in "),
    ],
)
def test_what_deepspeed_has_sharded_is_continued_as_it_was(
    together: Runs, stage: int, words: list[str], message: str
) -> None:
    assert refused(together.folder, "train", *sittings(together, stage)[-1]["overrides"], *words).startswith(message)


def test_one_selection_for_all_processes(together: Runs) -> None:
    """Statistics are summed over the processes, and what rank 0 chooses is what all train: as one process chooses."""
    folder = together.folder
    words = [*together.base, *PREPROCESS, "cache_dir=cache-1"]
    alone = Path(sparseft(folder, "preprocess", *words, "--json").json["selection"])
    both = Path(json.loads((folder / "preprocess.json").read_text())["selection"])
    assert alone.name == both.name  # the same key
    left, right = (load_file(folder / path / "selection.safetensors") for path in (alone, both))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert os.listdir(folder / "cache-2" / "selections") == [both.name]  # neither process has left its part behind


def test_resume_with_zero_takes_up_everything_and_runs_nothing(together: Runs, tmp_path: Path) -> None:
    """DeepSpeed's files are read with `weights_only`: what it keeps is there, and code that someone put there is not
    run, though the manifest fits."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(ran),))

    cases = []
    for method, stage in SEALED:
        case = together.case(method, stage, "trainer.save_steps=3", "trainer.save_total_limit=9")
        run = tmp_path / case["name"]
        shutil.copytree(together.folder / case["name"], run)
        shutil.rmtree(run / "checkpoints" / "checkpoint-5")
        shutil.rmtree(run / "adapter")
        words = [word for word in case["overrides"] if not word.startswith("output_dir=")]
        cases.append(case | {"overrides": [*words, f"output_dir={run}", "trainer.resume=auto"]})
    bad = tmp_path / "bad"
    shutil.copytree(tmp_path / "sylva-1", bad)
    checkpoint = bad / "checkpoints" / "checkpoint-3"
    torch.save({"module": Bomb()}, checkpoint / "global_step3" / "mp_rank_00_model_states.pt")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    overrides = [word.replace(str(tmp_path / "sylva-1"), str(bad)) for word in cases[0]["overrides"]]
    cases.append({"name": "bad", "command": "train", "overrides": overrides, "refused": True})
    first = [tmp_path / f"{method}-{stage}" / "checkpoints" / "checkpoint-3" for method, stage in SEALED]
    before = [folder.stat().st_ino for folder in first]
    run_ranks(tmp_path, cases)

    assert [folder.stat().st_ino for folder in first] == before  # not written anew, so not started anew
    for method, stage in SEALED:
        whole, resumed = together.folder / f"{method}-{stage}", tmp_path / f"{method}-{stage}"
        left, right = trained(whole), trained(resumed)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    message = json.loads((tmp_path / "bad.json").read_text())["message"]
    assert "checkpoint-3" in message and "what DeepSpeed saved cannot be taken up" in message
    assert not ran.exists()


@pytest.mark.slow
def test_every_method_and_stage(tmp_path: Path, model_folder: Any) -> None:
    runs = Runs(tmp_path, model_folder())
    run_ranks(runs.folder, [runs.case(method, stage) for method, stage in EVERY], seconds=1200)
    check(runs, EVERY, model_folder())


@pytest.mark.slow
def test_weights_in_bf16_train_alike_at_every_stage(tmp_path: Path, model_folder: Any) -> None:
    """With DeepSpeed's fp32 copies of them: less far from what fp32 weights learn than bf16 weights alone come."""
    runs = Runs(tmp_path, model_folder())
    run_ranks(runs.folder, [runs.case("bf16", stage) for stage in range(4)])
    base = {name: value.double() for name, value in load_file(runs.model / "model.safetensors").items()}
    for stage in (1, 3):
        assert difference(tmp_path / "bf16-2", tmp_path / f"bf16-{stage}", base) < 1e-2
    alone = runs.one("full")
    sharded, plain = (difference(alone, tmp_path / f"bf16-{stage}", base) for stage in (2, 0))
    print(f"\nbf16 against fp32: zero 2 {sharded:.2f}, DDP {plain:.2f}")
    assert sharded < plain


@pytest.mark.slow
def test_offload_to_the_host(tmp_path: Path, model_folder: Any) -> None:
    """Moments, and with stage 3 parameters, on the host: the same runs."""
    runs = Runs(tmp_path, model_folder())
    cases = [(method, stage) for method in ("s2ft", "lora", "full") for stage in (1, 2, 3)]
    cases.append(("s2ft, reselected", 2))
    run_ranks(runs.folder, [runs.case(*case, "hardware.offload=cpu") for case in cases], seconds=1200)
    check(runs, cases, model_folder())


def test_accumulation_is_a_larger_batch(in_tmp: Path, model_folder: Callable[..., Path]) -> None:
    """1 x 8, 8 x 1, and 8 split by the hardware into 4 x 2: the loss is a mean over the step's labelled tokens."""
    base = [*COMMON, f"model.path={model_folder()}", f"dataset.train_path={write_data(in_tmp)['json']}"]
    folders = []
    for batch_size, accumulation, *words in ((8, 1), (1, 8), (8, 1, "hardware.micro_batch=2")):
        folders.append(in_tmp / f"run{len(folders)}")
        words = [*METHODS["sylva"], *split(batch_size, accumulation), f"output_dir={folders[-1]}", *words]
        sparseft(in_tmp, "train", *base, *words)
    for other in folders[1:]:
        assert_same_losses(folders[0], other)
        assert difference(folders[0], other) < 1e-5


# ---- what processes share, without processes ----


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index], "labels": [index]}


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_lengthened_data_counts_no_example_twice(count: int) -> None:
    data = PaddedDataset(Numbers(count), 4)
    assert len(data) % 4 == 0 and len(data) - count < 4
    labels = [label for index in range(len(data)) for label in data[index]["labels"]]
    assert [label for label in labels if label != -100] == list(range(count))
    repeated = PaddedDataset(Numbers(count), 4, fillable=False)
    assert [repeated[index]["labels"][0] for index in range(len(repeated))] == [i % count for i in range(len(repeated))]


def test_the_order_is_that_of_one_process() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    data = PaddedDataset(Numbers(9), 4)
    sampler, alone = PaddedSampler(data, 5), SeedableRandomSampler(Numbers(9), data_seed=5)
    for epoch in (0, 3):
        data.set_epoch(epoch)
        alone.set_epoch(epoch)
        order = list(sampler)
        assert order[:9] == list(alone) and order[9:] == [9, 10, 11] and len(order) == len(sampler)


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_epoch_has_its_order_wherever_it_is_gone_on(epoch: int, skipped: int) -> None:
    """Through accelerate's loader of several processes, which wraps the sampler once more to leave batches out."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler

    found = []
    for rank in range(2):
        data = PaddedDataset(Numbers(7), 2)
        batches = BatchSamplerShard(torch.utils.data.BatchSampler(PaddedSampler(data, 0), 1, False), 2, rank)
        loader: Any = DataLoaderShard(data, batch_sampler=batches, collate_fn=lambda rows: rows[0]["labels"][0])
        if skipped:
            loader = skip_first_batches(loader, skipped)
        loader.set_epoch(epoch)
        found.append(list(loader))
    alone = SeedableRandomSampler(Numbers(7), data_seed=0)
    alone.set_epoch(epoch)
    assert [row for step in zip(*found, strict=True) for row in step] == [*alone, -100][2 * skipped :]
