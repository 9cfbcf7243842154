"""Data larger than memory: records read in chunks, tokens made once and kept in files."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.config import DatasetConfig
from sparseft.data import readers, records, tables
from sparseft.data import token_cache as caching
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.sources import open_source
from sparseft.data.token_cache import Cache, tokens_key
from sparseft.errors import UserError
from support.data import peaks
from support.running import METHODS, on, sparseft, write_data


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} plus one? ", "completion": f"it is {n + 1}"} for n in range(count)]


def write(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def load(path: str, tokenizer: Any, cache: Path, max_length: int = 64, **changes: Any) -> LoadedData:
    config = DatasetConfig(**{"train_path": path, "eval_fraction": 0.2, **changes})
    return load_datasets(config, tokenizer, max_length=max_length, seed=0, bundled=False, cache_dir=cache)


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").iterdir())


def was_cached(loaded: LoadedData) -> bool:
    return any("training tokens: cached" in note for note in loaded.notes)


# --- chunks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK_RECORDS", 3)
    monkeypatch.setattr(readers, "BLOCK", 16)


KINDS = {
    "prompt_completion": pairs(11),
    "guanaco": [{"text": f"### Human: {n}?### Assistant: {n + 1}"} for n in range(11)],
    "text": [{"text": f"a story of {n} " * 9} for n in range(11)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(11)
    ],
}


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_chunks_and_files_change_nothing(
    tmp_path: Path, tokenizer: Any, format: str, suffix: str, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(KINDS[format]), path, row_group_size=4)
    else:
        path.write_text(json.dumps(KINDS[format], indent=1)) if suffix == "json" else write(path, KINDS[format])
    whole = load(str(path), tokenizer, tmp_path / "whole", max_length=40)
    request.getfixturevalue("small_chunks")
    for cache in (tmp_path / "cache", tmp_path / "cache"):
        parts = load(str(path), tokenizer, cache, max_length=40)
        assert (list(parts.train), list(parts.eval)) == (list(whole.train), list(whole.eval))
        assert (parts.fingerprint, parts.format) == (whole.fingerprint, format)
        assert parts.questions.hashes.tolist() == whole.questions.hashes.tolist()
        assert (parts.dropped, parts.cut) == (whole.dropped, whole.cut)


@given(st.recursive(st.none() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.text(max_size=3), inner, max_size=3)), st.integers(1, 40), st.sampled_from([None, 0, 3]),
       st.booleans())  # fmt: skip
@settings(max_examples=80)
def test_an_array_is_decoded_as_json_does_whatever_the_window(
    tmp_path_factory: Any, value: Any, block: int, indent: int | None, escaped: bool
) -> None:
    file = tmp_path_factory.mktemp("array") / "a.json"
    values = [value, {"a": value}, 12345678901234567890, "end"]
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=escaped), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK", block)
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return  # half a surrogate pair, which no file can hold
        assert [item for _, item, _ in readers.json_array(file, "a.json")] == values


@pytest.mark.parametrize(
    "broken",
    ['[{"a": 1} {"b": 2}]', '[{"a": 1},]', '[{"a": 1}', '[{"a": 1}] []', '[{"a": "' + "x" * 40,
     '[\n{"a": 1},\n{"b" 2}]', '[{"a": nul}, {"b": 2}, {"c": 3}, {"d": 4}]', '[{"a": 1},\n {"b": "\\x"}]', "["],
)  # fmt: skip
def test_a_broken_array_is_named_where_json_would_name_it(tmp_path: Path, broken: str, small_chunks: None) -> None:
    (tmp_path / "a.json").write_text(broken)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(broken)
    with pytest.raises(UserError) as error:
        for _ in open_source(str(tmp_path / "a.json")).chunks():
            pass
    assert f"line {theirs.value.lineno}, column {theirs.value.colno}" in str(error.value), theirs.value
    assert "broken JSON" in str(error.value)


def test_bytes_that_are_no_utf8_are_found_in_any_block(tmp_path: Path, small_chunks: None) -> None:
    content = b'[{"text": "fine \xc3\xa9"},\n {"text": "bad \xe9"}]'
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.json, line 2: not UTF-8 text \(byte {content.index(bytes([0xE9, 34]))}\)"):
        list(open_source(str(tmp_path / "a.json")).chunks())


def test_a_bad_record_far_down_is_named_and_nothing_is_kept(tmp_path: Path, tokenizer: Any, small_chunks: None) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(10), {"prompt": "no answer"}])
    with pytest.raises(UserError, match="line 11: the prompt_completion record lacks 'completion'"):
        load(path, tokenizer, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_what_is_said_of_a_chat_far_down_is_kept_with_the_tokens(tmp_path: Path, small_chunks: None) -> None:
    """The template rewrites earlier turns of the tenth conversation alone."""
    from support.models import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q{{ m['content'] }}"
        "{% elif loop.last %}A{{ m['content'] }}{% else %}A{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": turns}] * 9 + [{"messages": turns * 2}]
    path = write(tmp_path / "a.jsonl", chats)  # type: ignore[arg-type]
    loaded = load(path, tokenizer, tmp_path / "cache", eval_fraction=0.0)
    assert any("one example an answer" in note for note in loaded.notes)
    assert len(loaded.train) == 11
    again = load(path, tokenizer, tmp_path / "cache", eval_fraction=0.0)
    assert was_cached(again) and any("one example an answer" in note for note in again.notes)
    assert list(again.train) == list(loaded.train)


def make_file(file: Path, mebibytes: int) -> Path:
    """A file of texts of 16 KiB in few words, so that the tokens' own pages, mapped into memory, do not count."""
    text = ("x" * 255 + " ") * 64
    records = ({"text": f"{n} {text}"} for n in range(mebibytes * 64))
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as table:
            for _ in range(mebibytes):
                table.write_table(pyarrow.Table.from_pylist([next(records) for _ in range(64)], schema))
        return file
    if file.suffix == ".arrow":
        import pyarrow

        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as table:
            for _ in range(mebibytes):
                table.write_table(pyarrow.Table.from_pylist([next(records) for _ in range(64)], schema))
        return file
    with file.open("w") as out:
        out.write("text\n" if file.suffix == ".csv" else "")
        for number, record in enumerate(records):
            line = record["text"] + "\n" if file.suffix in (".txt", ".csv") else json.dumps(record)
            out.write(("[" if number == 0 else ",") if file.suffix == ".json" else "")
            out.write(line + "\n")
        out.write("]" if file.suffix == ".json" else "")
    return file


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Files of 24 MiB of each kind are read, tokenised and split in less than half of that; those of 6 MiB that
    come first have what does not depend on the file loaded."""
    suffixes = ("json", "jsonl", "parquet", "txt", "csv", "arrow")
    files = [make_file(tmp_path / f"{size}.{suffix}", size) for size in (6, 24) for suffix in suffixes]
    found = peaks(tmp_path / "cache", files[: len(suffixes)], files[len(suffixes) :])
    assert len(found) == len(suffixes)
    for name, kibibytes, tokens in found:
        assert tokens > 80_000, name
        assert kibibytes < 12 * 1024, f"{name}: {kibibytes / 1024:.0f} MiB more"


def test_of_a_parquet_file_of_one_row_group_little_is_in_memory(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.table({"text": [f"{n} {'x' * 1020}" for n in range(8192)]})
    pyarrow.parquet.write_table(texts, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    del texts
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for number, item, _ in tables.parquet(tmp_path / "a.parquet", "a.parquet"):
        assert item["text"].startswith(f"{number - 1} x")
        most = max(most, pool.bytes_allocated() - before)
    assert number == 8192 and most < 4 * 2**20


# --- cache ------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_the_second_start_says_so(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20))
    first, second = (load(path, tokenizer, tmp_path / "cache") for _ in range(2))
    assert not was_cached(first) and was_cached(second)
    (entry,) = entries(tmp_path / "cache")
    assert any(f"training tokens: cached, {entry}" in note for note in second.notes)
    assert list(second.train) == list(first.train) and second.fingerprint == first.fingerprint
    # By content: another name and another seed of the split find it, other content does not.
    assert was_cached(load(write(tmp_path / "b.jsonl", pairs(20)), tokenizer, tmp_path / "cache", eval_fraction=0.5))
    assert not was_cached(load(write(tmp_path / "a.jsonl", pairs(21)), tokenizer, tmp_path / "cache"))


@pytest.mark.parametrize(
    "changes", [{"max_length": 26}, {"too_long": "drop"}, {"loss_on_prompt": True}, {"max_examples": 9},
                {"format": "prompt_completion"}],
)  # fmt: skip
def test_what_decides_the_tokens_is_part_of_the_key(tmp_path: Path, tokenizer: Any, changes: dict) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20))
    load(path, tokenizer, tmp_path / "cache")
    other = load(path, tokenizer, tmp_path / "cache", **changes)
    same = "format" in changes  # the one that is detected
    assert was_cached(other) == same
    fresh = load(path, tokenizer, tmp_path / "fresh", **changes)
    assert list(other.train) == list(fresh.train)


def test_the_tokenizer_is_part_of_the_key() -> None:
    from support.models import build_tokenizer

    base = tokens_key("content", build_tokenizer(), {})
    assert tokens_key("content", build_tokenizer(), {}) == base
    added, chat, eos = build_tokenizer(), build_tokenizer(), build_tokenizer()
    added.add_tokens(["zebra"])
    chat.chat_template = "{{ messages }}"
    eos.eos_token = "<pad>"
    keys = {tokens_key("content", each, {}) for each in (added, chat, eos)}
    assert len(keys | {base}) == 4
    assert tokens_key("other", build_tokenizer(), {}) != base


@pytest.mark.parametrize("damage", ["shorter", "flipped", "no description", "nonsense", "missing array"])
def test_a_damaged_entry_is_seen_and_made_anew(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20))
    first = load(path, tokenizer, tmp_path / "cache")
    whole = list(first.train)
    (entry,) = entries(tmp_path / "cache")
    labels = entry / "labels.bin"
    if damage == "shorter":
        labels.write_bytes(labels.read_bytes()[:-4])
    elif damage == "flipped":
        content = bytearray(labels.read_bytes())
        content[40] ^= 1
        labels.unlink()  # a file of its own: `first` still has the old one mapped
        labels.write_bytes(content)
    elif damage == "no description":
        (entry / "tokens.json").unlink()
    elif damage == "nonsense":
        (entry / "tokens.json").write_text('{"facts": []}')
    else:
        labels.unlink()
    again = load(path, tokenizer, tmp_path / "cache")
    assert any("cached tokens are damaged and are made anew" in warning for warning in again.warnings)
    assert list(again.train) == whole and not was_cached(again)
    third = load(path, tokenizer, tmp_path / "cache")
    assert was_cached(third) and not third.warnings and entries(tmp_path / "cache") == [entry]


def test_of_two_runs_that_make_one_entry_the_first_to_finish_leaves_it(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20))
    other = load(path, tokenizer, tmp_path / "elsewhere")
    (made,) = entries(tmp_path / "elsewhere")
    cache = Cache(tmp_path / "cache")
    with cache.making(made.name) as slow:
        first = load(path, tokenizer, tmp_path / "cache")  # starts later, ends first
        kept = os.stat(cache.path(made.name) / "tokens.json").st_ino
        slow.facts.records = 99
    assert os.stat(cache.path(made.name) / "tokens.json").st_ino == kept
    assert list(first.train) == list(other.train)
    assert [entry.name for entry in entries(tmp_path / "cache")] == [made.name]


def make_tokens(path: str, cache: Path) -> str:
    from support.models import build_tokenizer

    return load(path, build_tokenizer(), cache).fingerprint


def test_runs_side_by_side_do_not_break_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(500))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = pool.starmap(make_tokens, [(path, tmp_path / "cache")] * 8, chunksize=1)
    assert len(set(made)) == 1
    assert len(entries(tmp_path / "cache")) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", pairs(5))
    add = caching.Writer.add

    def add_late(self: Any, done: Any) -> None:
        write(Path(path), pairs(6))
        add(self, done)

    monkeypatch.setattr(caching.Writer, "add", add_late)
    with pytest.raises(UserError, match="a.jsonl was changed while it was read"):
        load(path, tokenizer, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_full_disk_and_a_folder_that_cannot_be_are_said(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", pairs(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir=.*file is no folder"):
        load(path, tokenizer, tmp_path / "file")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("_publish", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(caching, step, full)
            with pytest.raises(UserError, match="cache_dir: .*No space left on device; make room"):
                load(path, tokenizer, tmp_path / "cache")
        assert entries(tmp_path / "cache") == []


def test_what_a_killed_run_left_goes_after_a_day(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", pairs(5))
    for name, age in ((".partial-old-x", 2 * 24 * 3600), (".partial-new-x", 60)):
        folder = tmp_path / "cache" / "tokens" / name
        folder.mkdir(parents=True)
        (folder / "labels.bin").write_bytes(b"1234")
        for each in (folder / "labels.bin", folder):
            os.utime(each, (time.time() - age,) * 2)
    load(path, tokenizer, tmp_path / "cache")
    names = [entry.name for entry in entries(tmp_path / "cache")]
    assert ".partial-new-x" in names and ".partial-old-x" not in names and len(names) == 2


def test_train_says_that_tokens_are_cached(tmp_path: Path, model_folder: Any) -> None:
    words = [*on(model_folder("llama"), write_data(tmp_path)["json"]), *METHODS["s2ft"], "trainer.max_steps=1"]
    first = sparseft(tmp_path, "train", *words, "output_dir=one", "--json")
    second = sparseft(tmp_path, "train", *words, "output_dir=two", "--json")
    assert "tokens: cached" not in first.err
    assert "data: training tokens: cached, .cache/sparseft/tokens/" in second.err
    assert first.json["train_loss"] == second.json["train_loss"]


def test_what_another_process_finishes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Renamed:
        """A folder written aside, seen just before it gets its name."""

        def exists(self) -> bool:
            return True

        def glob(self, pattern: str) -> list[Path]:
            return []

        def stat(self) -> None:
            raise FileNotFoundError

    monkeypatch.setattr(caching, "asides", lambda folder: [Renamed()])
    with Cache(tmp_path).making("key"):
        pass
