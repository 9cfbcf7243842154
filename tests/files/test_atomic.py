"""What is written aside: in place as a whole, or the former in place and nothing beside it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sparseft.errors import RunError, UserError
from sparseft.files import atomic

MARKS = ("mark.json",)


def folder_of(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "mark.json").write_text(text)
    return path


def write(path: Path, text: str) -> None:
    with atomic.replaced_folder(path, MARKS) as aside:
        (aside / "mark.json").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "adapter", "old")
    (path / "deep").mkdir()
    (path / "deep/more.json").write_text("")
    with atomic.replaced_folder(path, MARKS, ("deep/*.json",)) as aside:
        (aside / "mark.json").write_text("new")
        os.chmod(aside / "mark.json", 0o600)  # as safetensors does
        assert (path / "mark.json").read_text() == "old" and aside.parent == path.parent
    assert [item.name for item in path.iterdir()] == ["mark.json"] and (path / "mark.json").read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((path / "mark.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert not list(atomic.asides(tmp_path))


def test_what_fails_leaves_the_former_folder(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "adapter", "old")
    with pytest.raises(KeyError), atomic.replaced_folder(path, MARKS) as aside:
        (aside / "mark.json").write_text("new")
        raise KeyError
    assert (path / "mark.json").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(tmp_path / "adapter", "old")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        write(path, "new")
    assert (path / "mark.json").read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_of_two_processes_the_later_one_is_there(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one publishes between this one's look and its rename."""
    path = folder_of(tmp_path / "adapter", "old") if there else tmp_path / "adapter"
    rename, others = os.rename, [folder_of(tmp_path / "elsewhere", "other")]

    def after_the_other(source: Path, target: Path) -> None:
        if target == path and others:
            rename(others.pop(), path)
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_the_other)
    write(path, "mine")
    assert (path / "mark.json").read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_within_what_is_aside_nothing_is_put_aside(tmp_path: Path) -> None:
    outer = atomic.new_aside(tmp_path / "checkpoint-1")
    with atomic.replaced_folder(outer / "checkpoint-1" / "adapter", MARKS) as aside:
        assert aside == outer / "checkpoint-1" / "adapter"
        (aside / "mark.json").write_text("new")
    with pytest.raises(KeyError), atomic.replaced_folder(outer / "failed", MARKS):
        raise KeyError
    assert not (outer / "failed").exists()
    atomic.publish(outer / "checkpoint-1", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1/adapter/mark.json").read_text() == "new"


@pytest.mark.parametrize("other", ["inner", "inner/x.bin", "model.gguf"])
def test_a_folder_of_other_files_is_not_replaced(other: str, tmp_path: Path) -> None:
    """Whatever else lies in it: a mark makes them none of ours."""
    path = folder_of(tmp_path / "mine", "x")
    (path / "inner").mkdir()
    (path / other).exists() or (path / other).write_text("mine")
    if other == "model.gguf":
        (path / "inner").rmdir()
    with pytest.raises(UserError, match=rf"holds other files, which would be lost \('{other}'\)"):
        atomic.check_replaceable(path, MARKS)
    with pytest.raises(UserError, match="holds other files") as refused:
        write(path, "new")
    [aside] = atomic.asides(tmp_path)  # hours of work: not thrown away
    assert str(aside) in str(refused.value) and (aside / "mark.json").read_text() == "new"
    assert (path / other).exists()


def test_patterns_reach_into_no_folder_and_file_managers_own_nothing(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "mine", "x")
    (path / "model.safetensors").write_text("")
    (path / ".DS_Store").write_text("")
    atomic.check_replaceable(path, MARKS, ("*.safetensors",))
    (path / "data").mkdir()
    (path / "data/model.safetensors").write_text("mine")
    with pytest.raises(UserError, match=r"would be lost \('data/model.safetensors'\)"):
        atomic.check_replaceable(path, MARKS, ("*.safetensors",))


def test_a_link_to_a_folder_is_replaced_and_never_followed(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "theirs", "old")
    (tmp_path / "adapter").symlink_to(theirs)
    write(tmp_path / "adapter", "new")
    assert (theirs / "mark.json").read_text() == "old" and (tmp_path / "adapter/mark.json").read_text() == "new"
    assert not (tmp_path / "adapter").is_symlink() and not list(atomic.asides(tmp_path))
    (tmp_path / "latest").symlink_to("gone")
    atomic.replace_link(tmp_path / "latest", "theirs")
    assert os.readlink(tmp_path / "latest") == "theirs"


def test_removing_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path / "checkpoint-1", "x")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # as if killed here
    atomic.remove(path)
    (left,) = atomic.asides(tmp_path, "checkpoint-1")
    assert not path.exists() and (left / "mark.json").is_file()


def test_what_a_killed_process_left_is_named_with_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = atomic.new_aside(tmp_path / "out[1]")
    (left / "mark.json").write_text("x" * 2500)
    atomic.new_aside(tmp_path / "not-out[1]")
    atomic.name_leftovers(tmp_path / "out[1]")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: '{left}' (2.5 kB) is what a killed process left")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("3072 requested and 2292 written")]
)
def test_a_full_disk_is_said_in_a_sentence(error: OSError) -> None:
    """The second is numpy's, of an array that did not fit; a GGUF file is written by it."""
    with (
        pytest.raises(RunError, match="the export could not be written: "),
        atomic.explained("the export", lambda: None),
    ):
        raise error
    with pytest.raises(OSError, match="another"), atomic.explained("the export", lambda: None):
        raise OSError("another")


@pytest.mark.parametrize("mounted", [True, False])
def test_what_cannot_be_put_aside_is_said_before_the_work(
    mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point cannot be renamed; renamed, the folder one is in would leave the shell in what is deleted."""
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    else:
        monkeypatch.chdir(place / "below")
    with pytest.raises(UserError, match="mounted there" if mounted else "you are in it"):
        atomic.check_replaceable(place, ("below",))
    (tmp_path / "link").symlink_to(place)
    (place / "below").rmdir() if mounted else monkeypatch.chdir(tmp_path)
    atomic.check_replaceable(tmp_path / "link", ("below",))  # a link can be


def test_after_the_work_the_current_folder_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long run leaves is worth more than where a shell is."""
    path = folder_of(tmp_path / "adapter", "old")
    monkeypatch.chdir(path)
    write(path, "new")
    assert (path / "mark.json").read_text() == "new"
