"""How much host memory a process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sparseft import memory

GIB = 2**30
NAMES = {  # by version: limit, use, and what of it are files that were read
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture(params=NAMES)
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    line = "0::/user/job 7\n" if request.param == 2 else "3:cpu:/other\n4:memory:/user/job 7\n0::/\n"
    (tmp_path / "memberships").write_text(line)
    monkeypatch.setattr(memory, "MEMBERSHIPS", tmp_path / "memberships")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    return request.param


def group(version: int, path: str, limit: int | str, used: int, read: int = 0) -> None:
    limit_name, used_name, read_name = NAMES[version]
    folder = (memory.GROUPS if version == 2 else memory.GROUPS / "memory") / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{read_name} {read}\n")


def test_a_job_has_what_its_group_allows(version: int) -> None:
    group(version, "user/job 7", GIB, GIB // 2, read=GIB // 4)
    assert memory.available_bytes() == GIB * 3 // 4


def test_a_group_has_no_more_than_those_that_it_is_in(version: int) -> None:
    group(version, "user/job 7", GIB, GIB // 4)
    group(version, "user", GIB // 2, GIB // 4)
    assert memory.available_bytes() == GIB // 4


def test_the_group_of_a_container_is_mounted_as_the_root(version: int) -> None:
    group(version, ".", GIB // 8, 0)
    assert memory.available_bytes() == GIB // 8


def test_more_in_use_than_is_allowed_leaves_nothing(version: int) -> None:
    group(version, "user/job 7", GIB, GIB + 5)
    assert memory.available_bytes() == 0


def test_without_a_limit_it_is_the_machine_that_says(version: int) -> None:
    group(version, "user/job 7", "max" if version == 2 else 2**63 - 4096, GIB)
    assert memory.available_bytes() > 0.5 * psutil.virtual_memory().available


def test_without_groups_it_is_the_machine_that_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMBERSHIPS", tmp_path / "none")
    assert memory.available_bytes() > 0.5 * psutil.virtual_memory().available
