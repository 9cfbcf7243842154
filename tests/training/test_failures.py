"""What ends a run before its end: steps without a finite loss, memory, the disk, damaged checkpoints, signals."""

from __future__ import annotations

import errno
import importlib
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseft import signals
from sparseft.errors import RunError
from sparseft.runs.folder import prepare_run_folder
from sparseft.runs.lock import Lock
from sparseft.training.checkpoints import check, checkpoint_steps, good_checkpoint, last_checkpoint, write_manifest
from sparseft.training.failures import MemoryAdvice, memory_problem, out_of_memory
from sparseft.training.trainer import train
from support.running import METHODS, files, metrics, on, refused, sparseft, summary, write_data
from support.training import At, attached, examples, long_run, same_end, spoil, tensors, trained, trainer_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("failures"))["json"]


# ---- steps without a finite loss ----


def snapshot(trainer: Any) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    moments = [value.clone() for entry in state.values() for value in entry.values() if torch.is_tensor(value)]
    return [*trained(trainer.model).values(), *moments]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("method", "optimizer"), [("s2ft", "adamw_torch"), ("lora", "adamw_torch"), ("sylva", "sgd")])
def test_a_bad_step_updates_nothing(make_model: Any, tmp_path: Path, what: str, method: str, optimizer: str) -> None:
    trainer = trainer_of(attached(make_model("llama"), method), tmp_path, examples(16), max_steps=6, save_steps=1,
                         gradient_accumulation=2, optimizer=optimizer, weight_decay=0.1,
                         save_total_limit=9)  # fmt: skip
    spoil(trainer, {3, 4}, what)
    seen: dict[int, list[torch.Tensor]] = {}
    for step in range(1, 6):
        trainer.add_callback(At(step, lambda step=step: seen.__setitem__(step, snapshot(trainer))))
    done = train(trainer, None, 6)
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[4], strict=True))  # weights and moments
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[5], strict=True))
    assert done.bad == 2 and done.loss > 0
    lines = metrics(tmp_path)
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert [line.get("bad_steps") for line in lines] == [None, None, 1, 1, None, None]
    assert done.loss == pytest.approx(sum(line["loss"] for line in lines if line["loss"] is not None))
    # Nothing was saved among bad steps, and what was saved is good.
    assert checkpoint_steps(tmp_path / "checkpoints") == [1, 2, 5, 6]


def test_a_checkpoint_that_a_bad_step_put_off_comes_with_the_next_good_one(make_model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=12, save_steps=5,
                         gradient_accumulation=1, logging_steps=20, save_total_limit=9)  # fmt: skip
    spoil(trainer, {5, 6})
    train(trainer, None, 12)
    assert checkpoint_steps(tmp_path / "checkpoints") == [7, 10, 12]


def test_bad_steps_in_a_row_end_the_run(make_model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=9, save_steps=1,
                         gradient_accumulation=1, save_total_limit=9)  # fmt: skip
    trainer.run_state.bad_steps.limit = 3
    spoil(trainer, {2, 5, 6, 7, 8})
    with pytest.raises(RunError, match=r"not finite in the steps 5 to 7 \(trainer.max_bad_steps=3\)") as caught:
        train(trainer, None, 9)
    # The weights of step 3 gave a finite loss in step 4, those of step 4 never did.
    assert caught.value.last_checkpoint == str(tmp_path / "checkpoints" / "checkpoint-3")
    assert checkpoint_steps(tmp_path / "checkpoints") == [1, 3, 4]


@pytest.mark.parametrize("kind", ["s2ft adamw_torch", "lora adamw_torch", "full adamw_torch", "sylva sgd"])
def test_bad_steps_that_nobody_waits_for_are_told_later(
    kind: str, make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logged at the end alone: the same weights, counts and losses as where every step is looked at at once."""
    method, optimizer = kind.split()
    ends = []
    for logging_steps in (1, 9):
        run = tmp_path / str(logging_steps)
        trainer = trainer_of(attached(make_model("llama"), method), run, examples(16), max_steps=6, optimizer=optimizer,
                             gradient_accumulation=2, weight_decay=0.1, logging_steps=logging_steps)  # fmt: skip
        spoil(trainer, {3, 4}, "loss")
        said: list[int] = []
        for step in (2, 3, 4, 5):  # when the step after it begins
            trainer.add_callback(At(step, lambda t=trainer, s=said: s.append(t.run_state.bad_steps.count)))
        done = train(trainer, None, 6)
        assert said == ([0, 1, 2, 2] if logging_steps == 1 or optimizer == "sgd" else [0, 0, 1, 2])
        health = trainer.run_state.bad_step_counts()
        ends.append((trained(trainer.model), done.bad, done.loss, done.tokens, health, metrics(run)[-1]["step"]))
        err = capsys.readouterr().err
        assert err.count("warning: step 3: loss nan, gradient norm nan: not finite, so the step updates nothing") == 1
    (weights, *facts), (later_weights, *later_facts) = ends
    assert facts == later_facts and facts[0] == 2 and facts[2] > 0
    assert facts[3] == {"bad": 2, "streak": 0, "proven": 5}
    assert all(torch.equal(weights[name], later_weights[name]) for name in weights)


def test_a_run_that_nobody_waits_for_ends_a_step_later(make_model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=9, save_steps=4,
                         gradient_accumulation=1, logging_steps=20)  # fmt: skip
    trainer.run_state.bad_steps.limit = 2
    spoil(trainer, {5, 6})
    with pytest.raises(RunError, match=r"not finite in the steps 5 to 6 \(trainer.max_bad_steps=2\)") as caught:
        train(trainer, None, 9)
    assert trainer.state.global_step == 7
    # The weights of step 4 never gave a finite loss, and no earlier ones were saved.
    assert caught.value.last_checkpoint is None and checkpoint_steps(tmp_path / "checkpoints") == [4]


@pytest.mark.parametrize(
    ("limit", "bad", "message"),
    [
        (2, {1, 2}, "in the steps 1 to 2 (trainer.max_bad_steps=2), which updated nothing: look at the data, and "
         "whether the model itself gives a finite loss (model.dtype). There is no good checkpoint of before, as none "
         "was saved yet."),
        (1, {2}, "in step 2 (trainer.max_bad_steps=1), which updated nothing: try a lower trainer.learning_rate, and "
         "look at the data of these steps. There is no good checkpoint of before: no step with the weights of "
         "checkpoint-1 had a finite loss, so start anew (overwrite=true)."),
    ],
)  # fmt: skip
def test_bad_steps_at_the_very_beginning(
    limit: int, bad: set[int], message: str, make_model: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=4, save_steps=1,
                         gradient_accumulation=1)  # fmt: skip
    trainer.run_state.bad_steps.limit = limit
    spoil(trainer, bad)
    with pytest.raises(RunError) as caught:
        train(trainer, None, 4)
    assert str(caught.value).endswith(message)
    assert caught.value.last_checkpoint is None
    assert checkpoint_steps(tmp_path / "checkpoints") == ([] if limit == 2 else [1])


def test_max_bad_steps_at_the_command_line(data: Path, model_folder: Any, tmp_path: Path) -> None:
    words = [*on(model_folder(), data), *METHODS["sylva"], "trainer.max_steps=6", "trainer.learning_rate=1e30"]
    done = sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.max_bad_steps=2", code=1)
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "not finite in the steps 2 to 3 (trainer.max_bad_steps=2)" in error
    assert error.endswith("There is no good checkpoint of before, as none was saved yet. (--debug shows the traceback)")
    assert not (tmp_path / "run" / "adapter").exists()
    assert "trainer.max_bad_steps=0: expected" in refused(tmp_path, "train", "trainer.max_bad_steps=0")


# ---- memory ----


def test_advice_is_what_fits() -> None:
    assert (
        "trainer.batch_size=4 trainer.gradient_accumulation=12 take the same 48"
        in MemoryAdvice(8, 6, 100, False).advice()
    )
    fit = MemoryAdvice(8, 6, 100, False)
    fit.micro_step(350)
    fit.step_done()
    fit.micro_step(700)  # what did not fit
    assert "trainer.batch_size=3 trainer.gradient_accumulation=16" in fit.advice() and "350 tokens" in fit.advice()
    # Not the hardware's setting, which trainer.checkpointing=none would outweigh.
    assert "trainer.checkpointing=full" in MemoryAdvice(1, 16, 512, False).advice()
    assert "trainer.max_length=256" in MemoryAdvice(1, 16, 512, True).advice()
    assert "trainer.max_length=300" in MemoryAdvice(1, 16, 512, True, fitted=300).advice()
    assert "trainer.batch_size=2 trainer.gradient_accumulation=3" in MemoryAdvice(6, 1, 10, False, fitted=25).advice()


def test_what_is_advised_fits_and_continues(
    data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds so many tokens: the advice of the message makes the run end, from its last checkpoint."""
    from sparseft.training.trainer import Trainer

    plain, room = Trainer.compute_loss, 24

    def compute_loss(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        if inputs["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return plain(self, model, inputs, **options)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=6", "output_dir=run"]
    words += ["trainer.batch_size=4", "trainer.gradient_accumulation=1", "dataset.eval_fraction=0"]
    done = sparseft(tmp_path, *words, code=1)
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB)" in error
    advised = re.findall(r"trainer\.(?:batch_size|gradient_accumulation)=\d+", error)
    assert len(advised) == 2
    room = 10**9
    short = [*words, "trainer.save_steps=1"]
    monkeypatch.setattr(Trainer, "training_step", failing_at(Trainer.training_step, 3))
    done = sparseft(tmp_path, *short, "overwrite=true", code=1)
    assert "The last good checkpoint is run/checkpoints/checkpoint-3." in done.err
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    room = 24
    other = refused(tmp_path, *short, "trainer.resume=auto", "trainer.batch_size=2")  # other examples a step
    assert "trainer.batch_size" in other
    sparseft(tmp_path, *short, *advised, "trainer.resume=auto")
    assert summary(tmp_path / "run")["steps"] == 6


def failing_at(plain: Any, step: int) -> Any:
    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")
        return plain(self, *args, **options)

    return training_step


def chained(error: BaseException, *causes: BaseException) -> BaseException:
    """`error`, raised from the first of the causes, that from the next."""
    for one, cause in zip((error, *causes), causes, strict=False):
        one.__cause__ = cause
    return error


ADVICE = MemoryAdvice(4, 1, 100, False).advice()
CREATED = "when calling `cublasCreate(handle)`"
SURE = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    "HIP": torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
    "the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED {CREATED}"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "hipBLAS": RuntimeError(f"CUDA error: HIPBLAS_STATUS_ALLOC_FAILED {CREATED}"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "NCCL": RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function "
        "failed.\nLast error:\nFailed to CUDA calloc async 608 bytes"
    ),
    "NCCL again": RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    "Metal": RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
    "the host, torch": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    "the host, torch on Windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
    "the host, Python": MemoryError(),
    "the host, numpy": MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,)"),
    "the host, the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "the host, C++": RuntimeError("std::bad_alloc"),
    "what a compiler made of it": chained(
        RuntimeError("backend='inductor' raised:\nLoweringException"), torch.OutOfMemoryError("CUDA out of memory.")
    ),
}
LIKELY = {
    "cuBLAS": RuntimeError(f"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED {CREATED}"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
}
OTHERS = {
    "a device assert": RuntimeError("CUDA error: device-side assert triggered"),
    "an illegal address": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    "the disk": OSError(errno.ENOSPC, "No space left on device"),
    "the user's text": ValueError("unknown word: CUDA out of memory"),
    "explained already": RunError("memory ran out (CUDA out of memory): trainer.batch_size=1"),
    "explained already, with its cause": chained(RunError("a checkpoint"), torch.OutOfMemoryError("out of memory")),
}


@pytest.mark.parametrize("who", SURE)
def test_whoever_runs_out_of_memory_gets_the_advice(who: str) -> None:
    problem = memory_problem(SURE[who], ADVICE)
    assert problem is not None and out_of_memory(SURE[who])
    assert problem.startswith("memory ran out (") and "\n" not in problem
    assert problem.endswith(": trainer.batch_size=2 trainer.gradient_accumulation=2 take the same 4 examples a step in "
                            "smaller pieces.")  # fmt: skip
    if who.startswith("NCCL"):  # the line that says it, not the first one
        assert "calloc" in problem or "out of memory" in problem


@pytest.mark.parametrize("who", LIKELY)
def test_a_library_that_cannot_set_itself_up_has_probably_no_memory(who: str) -> None:
    problem = memory_problem(LIKELY[who], ADVICE)
    assert problem is not None and out_of_memory(LIKELY[who])
    assert problem.startswith("memory has probably run out (") and "trainer.batch_size=2" in problem


@pytest.mark.parametrize("who", OTHERS)
def test_other_errors_get_no_advice_on_memory(who: str) -> None:
    assert memory_problem(OTHERS[who], ADVICE) is None
    assert not out_of_memory(OTHERS[who]) or "cause" in who


def refused_by_triton(module: str) -> BaseException:
    """Triton's error, raised from within a module of that name."""
    from triton.runtime.errors import OutOfResources

    scope: dict[str, Any] = {"__name__": module, "error": OutOfResources(147456, 101376, "shared memory")}
    exec("def launch():\n    raise error", scope)
    try:
        scope["launch"]()
    except OutOfResources as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("sparseft.kernels.blocks_triton", "a smaller method.block_size needs less, and SPARSEFT_KERNELS=reference in "
         "the environment does without"),
        ("sparseft.kernels.group_triton", "a smaller method.block_size needs less, and SPARSEFT_KERNELS=reference in "
         "the environment does without"),
        ("sparseft.kernels.experts_triton", "SPARSEFT_KERNELS=reference in the environment does without it"),
        ("sparseft.kernels.adamw_triton", "SPARSEFT_KERNELS=reference in the environment, or another "
         "trainer.optimizer, does without it"),
        ("torch._inductor.runtime", "it is none of sparseft's, so try without what may have brought it "
         "(trainer.compile=none, model.attn_implementation=sdpa), or with other shapes: trainer.batch_size=2 "
         "trainer.gradient_accumulation=2 take the same 4 examples a step in smaller pieces"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_kernel_too_large_for_the_gpu_is_not_a_want_of_memory(module: str, advice: str, wrapped: bool) -> None:
    pytest.importorskip("triton")
    error = refused_by_triton(module)
    assert not out_of_memory(error)
    if wrapped:
        error = chained(RuntimeError("backend raised"), error)
    assert memory_problem(error, ADVICE) == (
        "a Triton kernel does not fit this GPU (out of resource: shared memory, Required: 147456, Hardware limit: "
        f"101376): {advice}."
    )


def test_a_kernel_that_a_compiler_could_not_fit_is_not_a_want_of_memory() -> None:
    error = RuntimeError(
        "No valid triton configs. OutOfMemoryError: out of resource: triton_red_fused Required: 114688 Hardware "
        "limit:101376 Reducing block sizes or `num_stages` may help."
    )
    assert not out_of_memory(error)
    assert (memory_problem(error, ADVICE) or "").startswith("a Triton kernel does not fit this GPU (No ")


@pytest.mark.parametrize("place", ["compute_loss", "held_out_loss"])
@pytest.mark.parametrize("what", ["CUBLAS_STATUS_ALLOC_FAILED", "OutOfResources"])
def test_the_advice_reaches_the_user(
    what: str, place: str, data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and in the evaluation ahead of the first one."""
    from sparseft.training.trainer import Trainer

    if what == "OutOfResources":
        pytest.importorskip("triton")

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"CUDA error: {what}") if what != "OutOfResources" else refused_by_triton("other")

    monkeypatch.setattr(Trainer, place, fail)
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=2", "output_dir=run"]
    done = sparseft(tmp_path, *words, "trainer.batch_size=4", "trainer.gradient_accumulation=1", code=1)
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if what == "OutOfResources":
        assert "error: a Triton kernel does not fit this GPU (out of resource: shared memory" in error
    else:
        assert f"error: memory ran out (CUDA error: {what}): trainer.batch_size=2 trainer.gradient" in error


@pytest.mark.parametrize(
    ("place", "words", "advice"),
    [
        ("sample_answers.Asked.answers", ["trainer.sample_prompts=[seven]"], "fewer prompts in "
         "trainer.sample_prompts, "),
        ("reselection.way.reselect", ["method.reselect_steps=1", "method.reselect_by=calibration"], "re-selection by "
         "calibration takes less "),
    ],
)  # fmt: skip
def test_the_advice_is_of_what_ran_out(
    place: str, words: list[str], advice: str, data: Path, model_folder: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(f"sparseft.training.{place}", fail)
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=2", "output_dir=run", *words]
    done = sparseft(tmp_path, *words, "trainer.batch_size=4", "trainer.gradient_accumulation=1", code=1)
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: memory ran out (CUDA out of memory): {advice}") and "trainer.batch" not in error


def test_the_advice_is_of_the_task_that_judges(make_model: Any, tmp_path: Path) -> None:
    def fail(_leave: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(8), examples(4), max_steps=1)
    trainer.score = fail
    with pytest.raises(RunError, match=r"memory ran out \(CUDA out of memory\): smaller eval.batch_size"):
        trainer.evaluate()


# ---- the disk ----


@pytest.mark.parametrize("limit", [6_000, 30_000])  # within the adapter; within the optimizer's state
def test_a_full_disk_ends_the_run_and_damages_nothing(
    limit: int, data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's limit on file sizes stands for the disk: writes fail half-way, with what they wrote left there."""
    from sparseft.training.trainer import Trainer

    words = [*on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=5", "trainer.save_steps=2"]
    words += ["output_dir=run", "dataset.eval_fraction=0"]
    plain = Trainer._save_aside
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Trainer, *args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if self.state.global_step > 2 else soft, hard))
        try:
            plain(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Trainer, "_save_aside", save)
    done = sparseft(tmp_path, "train", *words, code=1)
    monkeypatch.undo()
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "checkpoint-4 could not be written: " in error and "checkpoints/checkpoint-2." in error
    assert [item.name for item in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    check(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    sparseft(tmp_path, "train", *words, "trainer.resume=auto")
    sparseft(tmp_path, "train", *words, "output_dir=whole")
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "run")[name], value), name


def test_a_disk_that_fills_up_at_the_end_is_said(
    data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from sparseft.training.job import finish

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/summary.json")

    monkeypatch.setattr(finish, "write_json", lambda path, content: full() if "summary" in str(path) else None)
    words = [*on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=1", "dataset.eval_fraction=0"]
    done = sparseft(tmp_path, "train", *words, "output_dir=run", code=1)
    assert "run/summary.json: No space left on device" in done.err
    assert "The last good checkpoint is run/checkpoints/checkpoint-1." in done.err


@pytest.mark.parametrize("written", ["selection", "adapter"])
def test_a_disk_without_room_for_a_folder_is_no_wrong_input(
    written: str, data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from sparseft.files import atomic

    plain = atomic.new_aside

    def full(path: Path) -> Path:
        if path == tmp_path / "run" / written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
        return plain(path)

    monkeypatch.setattr(atomic, "new_aside", full)
    words = [*on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=1", "dataset.eval_fraction=0"]
    done = sparseft(tmp_path, "train", *words, "output_dir=run", code=1)
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "the run in 'run' could not be written: " in error and ": No space left on device." in error
    assert ("The last good checkpoint is run/checkpoints/checkpoint-1." in error) is (written == "adapter")
    monkeypatch.undo()
    sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, data: Path, model_folder: Any) -> None:
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=1"]
    message = refused(tmp_path, *words, "output_dir=/proc/run")
    assert "/proc/run" in message and ("Permission denied" in message or "No such file" in message)


# ---- damaged checkpoints ----


@pytest.fixture(scope="module")
def whole(data: Path, model_folder: Any) -> Path:
    sparseft(data.parent, *long_run("s2ft", model_folder(), data), "output_dir=whole")
    return data.parent / "whole"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "optimizer flipped": lambda f: flip(f / "optimizer.pt"),
    "adapter truncated": lambda f: os.truncate(f / "adapter" / "adapter_model.safetensors", 200),
    "state missing": lambda f: (f / "trainer_state.json").unlink(),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "manifest torn": lambda f: os.truncate(f / "manifest.json", 40),
    "a file more": lambda f: (f / "scaler.pt").write_bytes(b"x"),
    "a link": lambda f: ((f / "scheduler.pt").rename(f.parent / "s"), (f / "scheduler.pt").symlink_to(f.parent / "s")),
    "another's": lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "checkpoint-4", f)),
    "sealed without its optimizer": lambda f: ((f / "optimizer.pt").unlink(), seal_again(f)),
    "sealed with a broken state": lambda f: ((f / "trainer_state.json").write_text("{}"), seal_again(f)),
}


def seal_again(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[case](run / "checkpoints" / "checkpoint-7")
    assert good_checkpoint(run) == str(run / "checkpoints" / "checkpoint-6")
    assert capsys.readouterr().err.count("warning: a damaged checkpoint is passed over: ") == 1


@pytest.mark.parametrize("case", ["adapter truncated", "another's", "sealed with a broken state"])
def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    case: str, whole: Path, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[case](run / "checkpoints" / "checkpoint-7")
    done = sparseft(data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    assert done.err.count("warning: a damaged checkpoint is passed over: ") == 1, done.err
    assert f"resume: {run}/checkpoints/checkpoint-6" in done.err
    shutil.rmtree(run / "checkpoints" / "damaged-checkpoint-7")
    same_end(run, whole)
    check(run / "checkpoints" / "checkpoint-7")


def test_a_damaged_checkpoint_is_never_called_good(
    whole: Path, data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseft.training.trainer import Trainer

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "checkpoint-7" / "optimizer.pt")
    damaged = files(run / "checkpoints" / "checkpoint-7")

    def fail(*_: Any, **__: Any) -> Any:
        raise RunError("the device is gone.")

    monkeypatch.setattr(Trainer, "training_step", fail)
    words = [*long_run("s2ft", model_folder(), data), f"output_dir={run}"]
    done = sparseft(data.parent, *words, "trainer.resume=auto", code=1)
    assert f"The last good checkpoint is {run}/checkpoints/checkpoint-6." in done.err
    assert files(run / "checkpoints" / "damaged-checkpoint-7") == damaged  # moved aside, not lost
    prepare_run_folder(str(run), "s2ft", "json", overwrite=True)
    assert files(run) == set()


def test_a_run_that_another_job_trains_is_left_alone(
    whole: Path, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    """Going on would take its newest checkpoint for damaged, replacing it would delete it while it trains."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "checkpoint-7" / "optimizer.pt")
    before = files(run)
    with Lock() as other:
        other.take(run)
        for word in ("trainer.resume=auto", "overwrite=true"):
            message = refused(data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={run}", word)
            assert f"output_dir '{run}' is in use by process {os.getpid()} on" in message
            assert files(run) == before
    sparseft(data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    assert (run / ".lock").read_bytes() == b""


def test_content_that_no_hash_shows_is_refused_in_a_sentence(
    whole: Path, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    """Someone who writes the manifest too can make anything of the files but code that runs."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(ran),))

    for name, content in (("optimizer.pt", Bomb()), ("rng_state.pth", {"cpu": Bomb()}), ("scheduler.pt", [1])):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "checkpoint-7")
        folder = run / "checkpoints" / "checkpoint-6"
        torch.save(content, folder / name)
        seal_again(folder)
        words = [*long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto"]
        message = refused(data.parent, *words)
        assert "checkpoint-6" in message and "cannot be taken up" in message
        assert not ran.exists()


def test_a_run_whose_parts_lead_out_of_it_is_not_continued(
    whole: Path, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(whole, run)
    (run / "checkpoints").rename(outside)
    (run / "checkpoints").symlink_to(outside)
    before = files(outside)
    words = [*long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto"]
    assert "leads out of the run's folder" in refused(data.parent, *words, "trainer.save_total_limit=1")
    assert files(outside) == before


def test_a_checkpoint_holds_what_trains_and_no_more(whole: Path) -> None:
    """Three float32 numbers and an index share a trained weight, whatever the size of the base."""
    folder = whole / "checkpoints" / "checkpoint-7"
    count = summary(whole)["trainable_parameters"]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert 4 * count < sizes["adapter/adapter_model.safetensors"] < 4 * count + 8192
    assert 8 * count < sizes["optimizer.pt"] < 8 * count + 16384
    assert sum(sizes.values()) < 12 * count + 65536


# ---- signals in every stage ----

STAGES = {
    "loading the model": "transformers/AutoModelForCausalLM:from_pretrained",
    "reading the data": "sparseft.data.sources:open_file",
    "evaluating": "sparseft.training.trainer/Trainer:held_out_loss",
    "saving a checkpoint": "sparseft.training.trainer:write_manifest",
    "saving the adapter": "sparseft.adapters.sparse:write_sparse",
    "writing the summary": "sparseft.training.job.finish:write_json",
}


# The same code answers both: SIGTERM is sent only before there is a trainer, while there is one, and after it.
SIGNALS = [(stage, signal.SIGINT) for stage in STAGES]
SIGNALS += [(stage, signal.SIGTERM) for stage in ("loading the model", "saving a checkpoint", "writing the summary")]
SIGNALS += [(stage, signal.SIGHUP) for stage in ("loading the model", "saving a checkpoint")]


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP is not ignored, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(("stage", "number"), SIGNALS)
def test_a_signal_in_any_stage_exits_130_and_the_run_goes_on(
    stage: str,
    number: signal.Signals,
    whole_short: Path,
    data: Path,
    model_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, _, name = STAGES[stage].rpartition(":")
    owner: Any = importlib.import_module(place.partition("/")[0])
    for part in place.split("/")[1:]:
        owner = getattr(owner, part)
    plain = getattr(owner, name)

    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, signalled)
    words = short_run(data, model_folder)
    done = sparseft(tmp_path, *words, "output_dir=run", code=130)
    monkeypatch.undo()
    assert done.out == "" and done.err.splitlines()[-1].startswith("error: interrupted.")
    if "saving" in stage or "summary" in stage:
        assert "The last good checkpoint is run/checkpoints/checkpoint-" in done.err
        check(Path(last_checkpoint(tmp_path / "run") or ""))
    sparseft(tmp_path, *words, "output_dir=run")
    for key, value in tensors(whole_short).items():
        assert torch.equal(tensors(tmp_path / "run")[key], value), key
    assert not {name for name in files(tmp_path / "run") if name.startswith(".") or "/." in name}


def test_a_hangup_is_ignored_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.terminable(), signals.noted(lambda name: None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def short_run(data: Path, model_folder: Any) -> list[str]:
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=3", "trainer.save_steps=1"]
    return [*words, "trainer.resume=auto"]


@pytest.fixture(scope="module")
def whole_short(data: Path, model_folder: Any) -> Path:
    sparseft(data.parent, *short_run(data, model_folder), "output_dir=short")
    return data.parent / "short"
