"""What all tests share: an offline CPU environment, tiny random models, and a tokenizer for them.

The environment is set here, before any test module imports torch, triton or transformers.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from support.models import (
    build_model,
    build_tokenizer,
)
from support.pages import blank_pages

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring


def has_gpu_device() -> bool:
    """Whether a CUDA device may be there, without importing torch (triton reads its variable when first imported)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(
        Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")
    )


if not has_gpu_device():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter where there is no GPU

# Property tests draw the same cases every time, so that a failure is the change's; SPARSEFT_FUZZ=1 draws others.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None)
hypothesis.settings.load_profile("fuzz" if os.environ.get("SPARSEFT_FUZZ") == "1" else "steady")


LONG = ["processes", "bench", "training", "trim", "commands", "importance"]  # folders that take long, longest first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take long first, as pytest-xdist hands them out in this order: else one ends alone.

    Skips tests marked `gpu` without a CUDA device; with SPARSEFT_REQUIRE_GPU=1 they run, and so fail, instead."""
    items.sort(key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("SPARSEFT_REQUIRE_GPU") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


_imported = 0  # modules when the collector was last told to leave out what is there


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves the libraries out of garbage collection: each pass over their million objects takes half a second, and
    every run of training asks for one. Cycles made later are collected as ever."""
    global _imported
    if len(sys.modules) > _imported + 300:
        _imported = len(sys.modules)
        gc.unfreeze()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_pages() -> Iterator[None]:
    """Runs leave a blank page: tests that read one, or are about what may stand in it, ask for `real_pages`."""
    with blank_pages():
        yield


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in an empty working directory of its own; returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(kind, dtype=None, seed=0)`: see `build_model`."""
    return build_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder(kind="llama", dtype=None)`: a Hugging Face folder of a tiny model with the tokenizer, made once
    a session. Its vocabulary is the tokenizer's and a few rows to spare (Qwen2's tokenizer class adds a token of
    its own). Tests must not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str = "llama", dtype: Any = None) -> Path:
        key = (kind, str(dtype))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"model-{kind}")
            tokenizer = build_tokenizer()
            build_model(kind, dtype, vocab_size=len(tokenizer) + 8).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
