"""What fails while a model trains: steps whose loss or gradient is not finite, and memory that runs out.

Of the latter: how it is told from other failures, and the settings that would have fitted.
"""

from __future__ import annotations

import errno
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparseft.errors import RunError, UserError, shown


@dataclass
class BadSteps:
    """The steps whose loss or gradient was not finite: they update nothing."""

    limit: int  # so many bad steps in a row end the run
    count: int = 0  # in the whole run
    streak: int = 0  # the last steps that were bad, in a row
    proven: int = -1  # the last optimizer step whose weights gave a finite loss in the step after it; -1: none

    def judge(self, step: int, loss: float, norm: float | None) -> bool:
        """Counts the optimizer step number `step` (1-based), and says whether it is good."""
        if math.isfinite(loss):
            self.proven = step - 1
        if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
            self.streak = 0
            return True
        self.count += 1
        self.streak += 1
        return False


# ---- memory ----

# What libraries say, in lower case, where memory ran out: CUDA, HIP and Triton ("CUDA error: out of memory", "Triton
# Error [CUDA]: out of memory"), their constants, cuBLAS, cuDNN and the like, NCCL, torch's and the system's allocators.
NO_MEMORY = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "cudaerrormemoryallocation",
    "alloc_failed",
    "rocblas_status_memory_error",
    "failed to cuda calloc",
    "failed to cuda malloc",
    "defaultcpuallocator",
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "not enough memory",
    "bad_alloc",
)

# A library fails to initialise: mostly because memory ran out, but it does not say so.
NO_MEMORY_LIKELY = ("cublas_status_not_initialized", "cudnn_status_not_initialized", "cusolver_status_not_initialized")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's, be it as the cause of `error`."""
    return any(_want_of_memory(one) for one in _causes(error))


def memory_problem(error: BaseException, advice: str) -> str | None:
    """What ran out and the settings that would fit (`advice`), as one sentence, where that is what `error` says; None
    for any other error, and for one that has been explained."""
    if isinstance(error, (RunError, UserError)):
        return None
    for one in _causes(error):
        reason = _want_of_resources(one)
        if reason:
            return f"a Triton kernel does not fit this GPU ({shown(reason, 300)}): {_without_kernel(one, advice)}."
        reason = _want_of_memory(one)
        if reason:
            verb = "has probably run out" if _word_in(reason, NO_MEMORY_LIKELY) else "ran out"
            return f"memory {verb} ({shown(reason.rstrip('.'), 300)}): {advice}."
    return None


def _want_of_resources(error: BaseException) -> str | None:
    """What Triton says where a kernel needs more shared memory, registers or threads than the GPU has, however much
    memory is free; None for any other error."""
    if type(error).__name__ != "OutOfResources" and not isinstance(error, RuntimeError):
        return None
    line = next((line.strip() for line in str(error).splitlines() if "out of resource:" in line), "")
    return line.partition(". Reducing")[0].rstrip(".") or None  # the rest is advice for kernel authors


def _want_of_memory(error: BaseException) -> str | None:
    """The line that says so where `error` says that memory ran out; None for any other error."""
    if _want_of_resources(error):  # torch's compiler calls that an OutOfMemoryError
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return lines[0]
    if isinstance(error, OSError):
        return lines[0] if error.errno == errno.ENOMEM else None
    if isinstance(error, RuntimeError) and not isinstance(error, RunError):
        return next((line for line in lines if _word_in(line, NO_MEMORY + NO_MEMORY_LIKELY)), None)
    return None


def _word_in(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text.lower() for word in words)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, what that was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


def _without_kernel(refusal: BaseException, advice: str) -> str:
    """What does without the kernel that was refused, or makes it smaller: by whose it is, as the traceback tells."""
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(refusal.__traceback__)}
    if modules & {"sparseft.kernels.blocks_triton", "sparseft.kernels.group_triton"}:
        return "a smaller method.block_size needs less, and SPARSEFT_KERNELS=reference in the environment does without"
    if "sparseft.kernels.experts_triton" in modules:
        return "SPARSEFT_KERNELS=reference in the environment does without it"
    if "sparseft.kernels.adamw_triton" in modules:
        return "SPARSEFT_KERNELS=reference in the environment, or another trainer.optimizer, does without it"
    return (
        "it is none of sparseft's, so try without what may have brought it (trainer.compile=none, "
        f"model.attn_implementation=sdpa), or with other shapes: {advice}"
    )


@dataclass
class MemoryAdvice:
    """What a step's memory depends on, and what has fitted."""

    batch_size: int
    accumulation: int
    longest: int  # tokens of the longest example
    checkpointing: bool
    fitted: int = 0  # tokens, padding included, of the largest micro-batch of a step that was completed
    trying: int = 0  # of the present step

    def micro_step(self, tokens: int) -> None:
        self.trying = max(self.trying, tokens)

    def step_done(self) -> None:
        self.fitted, self.trying = max(self.fitted, self.trying), 0

    def advice(self) -> str:
        """The settings that would have fitted: the same examples a step, in smaller micro-batches where there are any.

        By what has fitted so far where something has, else by halving.
        """
        examples = self.batch_size * self.accumulation
        room = self.fitted // self.longest if self.fitted else self.batch_size // 2
        smaller = [size for size in range(min(room, self.batch_size - 1), 0, -1) if examples % size == 0]
        so_far = f" (micro-batches of up to {self.fitted:,} tokens have fitted)" if self.fitted else ""
        if smaller:
            return (
                f"trainer.batch_size={smaller[0]} trainer.gradient_accumulation={examples // smaller[0]} take the same "
                f"{examples} examples a step in smaller pieces{so_far}"
            )
        if not self.checkpointing:
            return "trainer.checkpointing=full computes the activations again instead of keeping them"
        length = min(self.fitted or self.longest // 2, self.longest - 1)
        return f"trainer.max_length={max(length, 2)} cuts the longest examples, of {self.longest:,} tokens{so_far}"
