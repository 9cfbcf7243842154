"""What a path names: files of every kind, patterns, folders, sets of the hub (a folder stands in for it); streams."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from sparseft.config import DatasetConfig
from sparseft.data import records
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.sources import Place, locate, open_source
from sparseft.errors import UserError
from support.data import load, make_tokenizer
from support.running import refused, sparseft


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def pairs(letter: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{letter} {number} =", "completion": "yes"} for number in range(count)]


def write(file: Path, items: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, items)))
    return file


def prompts(source: Any, count: int | None = None) -> list[str]:
    return [item["prompt"] for chunk in source.chunks(count) for item in chunk.items]


# ---- files ----


AWKWARD = [
    {"prompt": 'a "quoted", comma', "completion": "two\nlines\t."},
    {"prompt": "é ☃ 日本", "completion": " x "},
    {"prompt": "3", "completion": "0.50"},
]


def separated(separator: str) -> bytes:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["prompt", "completion"], delimiter=separator)
    table.writeheader()
    table.writerows(AWKWARD)
    return text.getvalue().encode()


def arrow(file: Path, as_stream: bool) -> None:
    table = pyarrow.Table.from_pylist(AWKWARD)
    with pyarrow.OSFile(str(file), "wb") as sink:
        kind = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
        with kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda file: file.write_bytes(separated(",")),
    "bom.csv": lambda file: file.write_bytes(b"\xef\xbb\xbf" + separated(",")),
    "a.TSV": lambda file: file.write_bytes(separated("\t")),
    "a.csv.gz": lambda file: file.write_bytes(gzip.compress(separated(","))),
    "a.tsv.zst": lambda file: file.write_bytes(pyarrow.compress(separated("\t"), "zstd", asbytes=True)),
    "stream.arrow": lambda file: arrow(file, True),
    "file.arrow": lambda file: arrow(file, False),
    "a.feather": lambda file: pyarrow.feather.write_feather(pyarrow.Table.from_pylist(AWKWARD), file),
    "a.parquet": lambda file: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(AWKWARD), file),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    found = open_source(str(tmp_path / name)).first(9)
    assert found.items == AWKWARD
    if "sv" in name.lower():  # the first field's line break counts
        assert [found.where(index)[-6:] for index in range(3)] == ["line 2", "line 4", "line 5"]


def test_an_empty_field_of_a_table_is_empty_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd,1+1,2\nSay hi,,hi\n")
    data = load(str(tmp_path / "a.csv"), tokenizer)
    assert data.format == "alpaca" and "### Input" not in tokenizer.decode(data.train[1]["input_ids"])
    tables = {
        "b.csv": ("prompt,completion\na,b\nc,\n,\n", "'completion'"),
        "c.tsv": ('text\nonce\n""\n""\n', "'text'"),
        "e.csv": ("prompt,completion,,\na,b,,\nc,,,\n,,,\n", "'completion'"),
        "d.csv": ("instruction,input,output,system,history\nAdd,1+1,2,,\nHi,,,,\nHo,,,,\n", "'output'"),
    }
    for name, (content, answer) in tables.items():
        (tmp_path / name).write_text(content)
        data = load(str(tmp_path / name), tokenizer)
        assert len(data.train) == 1
        assert data.warnings == [f"2 records left out: {answer} is empty (first: {tmp_path / name}, line 3)"]


@pytest.mark.parametrize(
    ("columns", "format"),
    [("instruction,output,text\n,,once\n,,upon\n", "text"), ("prompt,completion,text\n,,once\n,,upon\n", "text"),
     ("instruction,output,text\nAdd,,\nSay,hi,\n", "alpaca")],
)  # fmt: skip
def test_columns_that_are_empty_throughout_say_nothing_of_the_format(
    columns: str, format: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "a.csv").write_text(columns)
    data = load(str(tmp_path / "a.csv"), tokenizer)
    assert data.format == format and len(data.train) == (2 if format == "text" else 1)


@pytest.mark.parametrize(
    ("name", "separator", "said"),
    [("a.csv", ";", "semicolons; expected commas"), ("a.csv", "\t", "tabs; expected commas"),
     ("a.tsv", ",", "commas; expected tabs")],
)  # fmt: skip
def test_another_separator_is_named(tmp_path: Path, tokenizer: Any, name: str, separator: str, said: str) -> None:
    (tmp_path / name).write_text(f"prompt{separator}completion\na{separator}b\n")
    with pytest.raises(UserError, match=f"names one column, .*{said}"):
        load(str(tmp_path / name), tokenizer)


def test_a_quoted_separator_is_part_of_a_name(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text('"prompt,completion"\na\n')
    with pytest.raises(UserError, match="prompt,completion") as refusal:
        load(str(tmp_path / "a.csv"), tokenizer)
    assert "separated" not in str(refusal.value)


def test_webdataset_files(tmp_path: Path) -> None:
    for name, suffix in (("records.tar", "json"), ("texts.tar", "txt")):
        with tarfile.open(tmp_path / name, "w") as archive:
            for number, item in enumerate(pairs("w", 3)):
                content = (json.dumps(item) if suffix == "json" else item["prompt"]).encode()
                entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    assert open_source(str(tmp_path / "records.tar")).first(9).items == pairs("w", 3)
    assert open_source(str(tmp_path / "texts.tar")).first(9).items[1] == {"text": "w 1 ="}
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=r"dataset.train_path: '.*broken.tar' cannot be read"):
        open_source(str(tmp_path / "broken.tar"))


def test_patterns(tmp_path: Path, tokenizer: Any) -> None:
    for name, letter in (("b.jsonl", "b"), ("a.jsonl", "a"), ("deep/er/c.jsonl", "c")):
        write(tmp_path / name, pairs(letter, 2))
    KINDS["a.csv"](tmp_path / "d.csv")
    assert prompts(open_source(f"{tmp_path}/*.jsonl")) == ["a 0 =", "a 1 =", "b 0 =", "b 1 ="]
    assert [each[0] for each in prompts(open_source(f"{tmp_path}/**/[bc].jsonl"))] == ["b", "b", "c", "c"]
    assert prompts(open_source(f"{tmp_path}/*.jsonl"), 3) == ["a 0 =", "a 1 =", "b 0 ="]
    mixed = open_source(f"{tmp_path}/*.*")
    assert len(prompts(mixed)) == 7 and len(mixed.files) == 3
    chunks = list(mixed.chunks())
    assert [chunk.start for chunk in chunks] == [0, 2, 4]
    assert chunks[1].where(1) == f"{tmp_path}/b.jsonl, line 2" and chunks[2].where(0) == f"{tmp_path}/d.csv, line 2"
    data = load(f"{tmp_path}/*.jsonl", tokenizer)
    assert len(data.train) == 4 and any("(2 files)" in note for note in data.notes)
    (tmp_path / "[x].jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())  # a file of that very name
    assert locate(f"{tmp_path}/[x].jsonl") == Place((tmp_path / "[x].jsonl",))
    write(tmp_path / "b.jsonl", [{"text": "other"}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: this record has format text, but most"):
        load(f"{tmp_path}/*.jsonl", tokenizer)


def test_a_file_that_comes_to_a_pattern_is_read(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "a.jsonl", pairs("a", 2))
    write(tmp_path / "b.jsonl", pairs("b", 2))
    assert len(load(f"{tmp_path}/*.jsonl", tokenizer).train) == 4
    write(tmp_path / "c.jsonl", pairs("c", 2))
    assert len(load(f"{tmp_path}/*.jsonl", tokenizer).train) == 6


# ---- folders, and the hub by a folder that stands in for it ----

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: "data/train-*.jsonl"}
  - {split: train_sft, path: "data/sft.jsonl"}
  - {split: test, path: "data/test.jsonl"}
- config_name: other
  data_files: "data/other.jsonl"
---
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A set as the hub has them: two subsets, of which one has three splits."""
    folder = tmp_path / "owner" / "set"
    for name, letter, count in (("train-0", "a", 6), ("train-1", "b", 4), ("sft", "s", 3), ("test", "t", 2)):
        write(folder / "data" / f"{name}.jsonl", pairs(letter, count))
    write(folder / "data" / "other.jsonl", pairs("o", 1))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def hub(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """The name of that set on a hub whose repositories lie in `tmp_path`; the loading code is `datasets`' own."""
    real = datasets.load_dataset_builder

    def find(name: str, *args: Any, **options: Any) -> Any:
        return real(str(tmp_path / name) if (tmp_path / name).is_dir() else name, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.chdir(library)  # where no folder is called owner/set
    return "owner/set"


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_subsets_and_splits(library: Path, hub: str, where: str, tokenizer: Any) -> None:
    name = str(library) if where == "folder" else hub
    assert prompts(open_source(f"{name}:main")) == [each["prompt"] for each in (*pairs("a", 6), *pairs("b", 4))]
    assert prompts(open_source(f"{name}:main:train_sft")) == ["s 0 =", "s 1 =", "s 2 ="]
    assert prompts(open_source(f"{name}:main", split=None)) == ["t 0 =", "t 1 ="]  # to evaluate on
    assert prompts(open_source(f"{name}:other")) == ["o 0 ="]
    assert len(prompts(open_source(f"{name}:main", split="train[:30%]"))) == 3
    assert len(prompts(open_source(f"{name}:main:train[5:]+test"))) == 7
    data = load(f"{name}:main", tokenizer, eval_path=f"{name}:main")
    assert (data.train_source, data.eval_source) == (f"{name}:main (train)", f"{name}:main (test)")
    for path, said in (
        (name, "has several subsets: give one as .*:SUBSET. Available: main, other"),
        (f"{name}:mian", "has no subset 'mian'.* Did you mean 'main'"),
        (f"{name}:main:tran", "has no split 'tran'.* Did you mean 'train'"),
        (f"{name}:main:tran[:3]", "has no split 'tran'.* Did you mean 'train'"),
    ):
        with pytest.raises(UserError, match=said):
            open_source(path)
    with pytest.raises(UserError, match="no validation or test split.*has: train"):
        open_source(f"{hub}:other", split=None, key="dataset.eval_path")
    mixed = load_mix([f"{name}:main:train_sft:0.5", f"{name}:other:0.5"], library, tokenizer)
    assert mixed.train_source == f"{name}:main (train_sft) + {name}:other (train)" and len(mixed.train) == 2


def load_mix(mix: list[str], folder: Path, tokenizer: Any, **settings: Any) -> LoadedData:
    config = DatasetConfig(name="json", mix=mix, eval_fraction=0.0, **settings)
    return load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=folder / "cache")


def test_one_hub_set_by_two_names(hub: str, library: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="dataset.mix: 'owner/set:other' and 'owner/set:other:train' hold the same"):
        load_mix(["owner/set:other:1", "owner/set:other:train:1"], library, tokenizer)


def test_folders(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "plain" / "b.jsonl", pairs("b", 2))
    write(tmp_path / "plain" / "sub" / "a.jsonl", pairs("a", 2))
    (tmp_path / "plain" / "README.md").write_text("What this is.")
    assert prompts(open_source(str(tmp_path / "plain"))) == ["b 0 =", "b 1 =", "a 0 =", "a 1 ="]
    held_out = open_source(str(tmp_path / "plain"), split=None)  # a folder to evaluate on
    assert len(prompts(held_out)) == 4
    # What is there to test on is never trained on.
    write(tmp_path / "split" / "train.jsonl", pairs("a", 3))
    write(tmp_path / "split" / "test.jsonl", pairs("t", 2))
    data = load(str(tmp_path / "split"), tokenizer, eval_path=str(tmp_path / "split"))
    assert (len(data.train), len(data.eval)) == (3, 2)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.weird").write_text("x")
    with pytest.raises(UserError, match="dataset.eval_path: '.*none' cannot be read .*data files"):
        open_source(str(tmp_path / "none"), key="dataset.eval_path")
    write(tmp_path / "split" / "train.jsonl", [*pairs("a", 3), {"text": "odd"}])
    with pytest.raises(UserError, match=r"split/train\.jsonl, line 4"):  # our own reader's words
        load(str(tmp_path / "split"), tokenizer)


def test_what_lies_here_is_no_id_of_the_hub_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards are written from other folders, where `corpus/medical` would be one."""
    write(tmp_path / "corpus" / "medical" / "a.jsonl", pairs("a", 2))
    for name in ("notes", "a.jsonl"):
        write(tmp_path / "corpus" / name, pairs("b", 2))
    datasets.Dataset.from_list(pairs("a", 3)).save_to_disk(tmp_path / "corpus" / "saved")
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("corpus/medical", "./corpus/medical (train)"),
        ("corpus/medical:default:train", "./corpus/medical:default (train)"),
        ("corpus/saved", "./corpus/saved"),
        ("corpus/notes", "./corpus/notes"),
        ("corpus/a.jsonl", "corpus/a.jsonl"),
    ):
        assert open_source(path).name == name


def test_saved_sets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(pairs("a", 3))
    one.save_to_disk(tmp_path / "one")
    one.select([2, 0]).save_to_disk(tmp_path / "chosen")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    assert prompts(open_source(str(tmp_path / "one"))) == ["a 0 =", "a 1 =", "a 2 ="]
    assert prompts(open_source(str(tmp_path / "chosen"))) == ["a 2 =", "a 0 ="]
    assert prompts(open_source(str(tmp_path / "both"), split=None)) == ["a 1 ="]
    with pytest.raises(UserError, match="no split 'tran'"):
        open_source(f"{tmp_path / 'both'}::tran")


# ---- streams ----


@pytest.mark.parametrize("where", ["file", "hub"])
def test_a_stream_is_the_set_in_another_order_and_no_more_is_read(
    tmp_path: Path, hub: str, library: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BUFFER", 16)
    write(library / "data" / "sft.jsonl", pairs("s", 200))
    name = f"{hub}:main:train_sft" if where == "hub" else str(library / "data" / "sft.jsonl")
    whole = prompts(open_source(name))
    first, again, other = (prompts(open_source(name, streaming=True, shuffle=seed)) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other) == sorted(whole) and first != whole
    assert max(abs(first.index(each) - place) for place, each in enumerate(whole)) < 200
    source = open_source(name, streaming=True, shuffle=0)
    inner, read = source.source.items, []

    def counted() -> Any:
        for each in inner():
            read.append(each)
            yield each

    source.source.items = counted
    assert prompts(source, 50) == first[:50] and len(read) <= 50 + 16 + 1
    read.clear()
    assert len(source.first(3)) == 3 and len(read) <= 3 + 1  # what a format is detected by
    chunk = next(source.chunks(3))
    place = int(chunk.items[0]["prompt"].split()[1]) + 1
    assert chunk.where(0).endswith(f" {place}")  # it says where the record stands in the file


def test_a_stream_has_all_that_training_needs(hub: str, library: Path, tokenizer: Any) -> None:
    write(library / "data" / "sft.jsonl", pairs("s", 200))

    def stream(seed: int, **settings: Any) -> LoadedData:
        config = DatasetConfig(train_path=f"{hub}:main:train_sft", streaming=True, max_examples=100, **settings)
        return load_datasets(config, tokenizer, max_length=64, seed=seed, bundled=False, cache_dir=library / "cache")

    data = stream(0, eval_fraction=0.1)
    assert (len(data.train), len(data.eval)) == (90, 10)  # so that steps are known, and what is held out
    assert not set(data.train.example_keys()) & set(data.eval.example_keys())
    assert stream(0, eval_fraction=0.1).fingerprint == data.fingerprint != stream(1, eval_fraction=0.1).fingerprint
    assert not list((library.parent.parent / "hf").rglob("*.arrow"))  # nothing was loaded and kept by `datasets`


def test_what_is_evaluated_on_is_streamed_too_in_its_order(hub: str, library: Path, tokenizer: Any) -> None:
    config = DatasetConfig(
        train_path=f"{hub}:main:train_sft", eval_path=f"{hub}:main", streaming=True, max_examples=2,
    )  # fmt: skip
    data = load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=library / "cache")
    assert data.eval_source == f"{hub}:main (test)"
    assert [tokenizer.decode(each["input_ids"]).split("=")[0] for each in data.eval] == ["<s>t 0 ", "<s>t 1 "]
    assert not list((library.parent.parent / "hf").rglob("*.arrow"))
    with pytest.raises(UserError, match=r"a stream has no parts of splits \(test\[:1\]\): name a whole one"):
        open_source(f"{hub}:main:test[:1]", streaming=True)


def test_a_set_that_a_script_loads_is_refused(tmp_path: Path, hub: str, library: Path) -> None:
    (library / "set.py").write_text("raise SystemExit('never run')\n")
    folder = refused(tmp_path, "data", "owner/set")
    assert folder.startswith("dataset.train_path: the script set.py in the folder './owner/set' is in the way")
    assert folder.endswith("as dataset.train_path='./owner/set/*.jsonl'.")
    with pytest.raises(UserError, match="'owner/set' is loaded by a script .set.py., which datasets no longer runs"):
        open_source("owner/set")


def test_what_a_stream_needs_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs("a", 3))
    said = refused(tmp_path, "train", "dataset.train_path=a.jsonl", "dataset.streaming=true", "trainer.max_steps=10")
    assert "needs dataset.max_examples" in said and "trainer.max_steps=10 takes 160 examples" in said


def test_a_folder_in_a_run(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "mine" / f"{number}.jsonl", pairs(str(number), 3))
    shown = sparseft(tmp_path, "data", "mine", "--json", "dataset.eval_fraction=0").json
    assert shown["examples"] == 9 and shown["source"] == "mine (train)"
    assert "No file matches" not in refused(tmp_path, "data", "mine/*.csv")
    assert "no file matches 'mine/*.csv'" in refused(tmp_path, "data", "mine/*.csv")


def test_a_folder_of_several_kinds_says_what_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.csv").write_text("instruction,input,output\nA?,,1\n")
    (folder / "b.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n')
    (folder / "notes.txt").write_text("What these are.")
    said = sparseft(tmp_path, "data", "mixed").err
    (line,) = [line for line in said.splitlines() if line.startswith("warning: mixed")]
    read, left = ("a.csv", "b.jsonl") if "that of a.csv" in line else ("b.jsonl", "a.csv")
    assert f"that of {read}; not read: {left}." in line and f"'mixed/*{Path(left).suffix}'" in line
    (folder / left).unlink()
    assert "not read" not in sparseft(tmp_path, "data", "mixed").err
    (folder / read).unlink()
    (folder / "notes.txt").unlink()
    assert "the folder 'mixed' holds no data files: expected JSON" in refused(tmp_path, "data", "mixed")
