"""Of several processes on one machine the first one hashes and tokenises, the others read what it has left."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseft.compose.run_config import compose
from sparseft.data import contents
from sparseft.data.token_cache import Cache
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.training.prepare import prepare
from support.running import on, write_data

SECONDS = 60  # that the processes may take; they would wait for each other for hours


def refused_by(rank: int) -> Any:
    """What a process gets where `rank` alone refuses."""
    if ranks.rank_and_world()[0] == rank:
        raise UserError(f"process {rank} refuses")
    return rank


def refusal(work: Callable[[], Any]) -> str:
    try:
        return f"none: {work()}"
    except UserError as error:
        return str(error)


def process(rank: int, folder: Path, words: list[str]) -> None:
    """One of two: what it made and read of good data, and what it says of bad ones, as `RANK.json`."""
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    making, made = Cache.making, []

    def slow(self: Cache, key: str) -> Any:
        made.append(key)
        time.sleep(0.2)  # so that a process that does not wait finds nothing
        return making(self, key)

    Cache.making = slow  # type: ignore[method-assign]
    hashing, hashed = contents.file_hash, []

    def counted(file: Path) -> str:
        hashed.append(file)
        return hashing(file)

    contents.file_hash = counted
    data = prepare(compose("train", words)).data
    good, read = len(made), len(hashed)
    bad = refusal(lambda: prepare(compose("train", [*words, f"dataset.train_path={folder / 'bad.jsonl'}"])))
    others = [refusal(lambda at=at: ranks.main_first(lambda: refused_by(at), {})) for at in range(3)]
    found = {"made": good, "fingerprint": data.fingerprint, "bad": bad, "made in all": len(made), "others": others,
             "hashed": read}  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_the_first_process_of_a_machine_tokenises_for_all(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"prompt": "a", "completion": "b"})] * 40 + ['{"prompt": "a", "completion": 1}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    words = [*on(model_folder(), write_data(tmp_path)["json"]), "method=s2ft", f"cache_dir={tmp_path / 'cache'}"]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=process, args=(rank, tmp_path, words)) for rank in range(2)]
    for each in both:
        each.start()
    try:
        for each in both:
            each.join(SECONDS)
        assert [each.exitcode for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["fingerprint"] == second["fingerprint"]
    assert (first["made"], second["made"]) == (1, 0)
    assert (first["hashed"], second["hashed"]) == (2, 0)  # before it was read and afterwards
    assert first["bad"] == second["bad"] and "bad.jsonl, line 41: " in first["bad"]
    assert (first["made in all"], second["made in all"]) == (2, 0)
    assert first["others"] == ["process 0 refuses", "process 1 refuses", "none: 2"] == second["others"]
