"""Compressed data files: read as what they hold, bounded in memory, and said to be damaged where they are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sparseft.config import DatasetConfig
from sparseft.data import unpacking
from sparseft.data.loading import load_datasets
from sparseft.data.sources import open_source
from sparseft.errors import UserError
from support.running import sparseft

RECORDS = [{"prompt": f"{n} plus é? ", "completion": f"it is\u2028{n + 1}"} for n in range(700)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
TEXT = "\n\n".join(f"A story of {n}.\nIt ends." for n in range(50)).encode()


def by_pyarrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        out = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(out, codec) as stream:
            stream.write(content)
        return out.getvalue().to_pybytes()

    return compress


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    ".zst": by_pyarrow("zstd"),
    ".lz4": by_pyarrow("lz4"),
}


def items(path: Path) -> list[Any]:
    return [item for chunk in open_source(str(path)).chunks() for item in chunk.items]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_is_the_file_it_holds(tmp_path: Path, suffix: str) -> None:
    """Whatever its name says of the compression, and in as many parts as tools such as pigz or cat make of it."""
    compress = COMPRESS[suffix]
    for name, content in (("a.jsonl", LINES), ("a.json", ARRAY), ("a.txt", TEXT), ("a", LINES), ("a", ARRAY)):
        (tmp_path / name).write_bytes(content)
        expected = open_source(str(tmp_path / name))
        for packed in (name + suffix, name + suffix.upper(), f"b{Path(name).suffix}"):
            (tmp_path / packed).write_bytes(compress(content))
            source = open_source(str(tmp_path / packed))
            assert (source.unit, source.plain_text) == (expected.unit, expected.plain_text)
            assert [(c.items, c.numbers) for c in source.chunks()] == [(c.items, c.numbers) for c in expected.chunks()]
    (tmp_path / f"parts.jsonl{suffix}").write_bytes(compress(LINES[:1234]) + compress(LINES[1234:]))
    assert items(tmp_path / f"parts.jsonl{suffix}") == RECORDS


def test_a_name_that_says_compressed_may_be_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    assert items(tmp_path / "a.jsonl.gz") == RECORDS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_file_that_is_cut_off_is_said_to_be(tmp_path: Path, suffix: str, name: str) -> None:
    content = COMPRESS[suffix]({"a.jsonl": LINES, "a.json": ARRAY, "a.txt": TEXT}[name])
    for end in (24, len(content) // 2, len(content) - 1):
        (tmp_path / f"{name}{suffix}").write_bytes(content[:end])
        with pytest.raises(UserError, match=rf"{name}{suffix} is cut off: its (gzip|bzip2|xz|zstd|lz4) data end"):
            items(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])  # whose checksums are always there
def test_damage_is_called_damage_and_not_broken_json(tmp_path: Path, suffix: str) -> None:
    content = bytearray(COMPRESS[suffix](LINES))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=f"a.jsonl{suffix} is damaged: its .* data cannot be unpacked"):
        items(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_places_in_messages_are_those_of_the_content(tmp_path: Path, suffix: str) -> None:
    before = LINES.count(b"\n")
    cases = {
        LINES + b'{"prompt": 1,\n': ["line 701, column", "broken JSON"],
        LINES + b'{"prompt": "\xff"}\n': ["line 701", f"not UTF-8 text (byte {len(LINES) + 12})"],
        LINES + b'{"a": 1, "a": 2}\n': ["line 701", "the key 'a' stands twice"],
        LINES + b"[1]\n": ["line 701", "must be a JSON object"],
        b'{\n "prompt": "a"\n}': ["is one JSON object"],
        b"": ["is empty"],
        b" \n" * 70000: ["is empty"],
    }
    assert before == 700
    for content, words in cases.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](content))
        with pytest.raises(UserError) as error:
            items(tmp_path / f"a.jsonl{suffix}")
        for word in [f"a.jsonl{suffix}", *words]:
            assert word in str(error.value)


def test_archives_and_what_cannot_be_read_within_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    (tmp_path / "zip.jsonl").write_bytes((tmp_path / "a.zip").read_bytes())
    (tmp_path / "a.tgz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "a.tar.zst").write_bytes(COMPRESS[".zst"]((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bz2.compress(LINES)))
    cases = {
        "a.zip": "is a zip archive; unpack it",
        "zip.jsonl": "is a zip archive; unpack it",
        "a.tar": "is a tar archive; .*unpack it",
        "a.tgz": "is a tar archive, compressed with gzip; unpack it",
        "a.tar.zst": "is a tar archive, compressed with zstd; unpack it",
        "a.parquet.gz": "is a parquet file, compressed with gzip; parquet compresses by itself",
        "a.jsonl.gz": "is compressed twice, with bzip2 and then with gzip",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=f"{name}:? {words}"):
            open_source(str(tmp_path / name))


BOMB = """
import resource, sys
from sparseft.data.sources import open_source
from sparseft.errors import UserError
import pyarrow
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, resource.RLIM_INFINITY))
for name in sys.argv[1:]:
    try:
        for _ in open_source(name).chunks():
            pass
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_what_unfolds_without_end_is_refused_in_little_memory(tmp_path: Path) -> None:
    cases = [(b"", b" \n", ".gz"), (b"", b"x", ".gz"), (b'["', b"x", ".gz"), (b"", b"x", ".xz"), (b"", b"x", ".zst")]
    names = []
    for number, (start, repeated, suffix) in enumerate(cases):
        names.append(f"{number}.data{suffix}")
        mebibyte = COMPRESS[suffix](repeated * (2**20 // len(repeated)))  # parts of a file add up to the file
        content = COMPRESS[suffix](start) + mebibyte * (unpacking.FREE // 2**20 + 8)
        (tmp_path / names[-1]).write_bytes(content)
        assert len(content) * unpacking.RATIO < unpacking.FREE
    done = subprocess.run(
        [sys.executable, "-c", BOMB, *names], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout + done.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{name}: its ") and "bytes unfold to more than" in line


def test_tokens_are_cached_and_equal_those_of_the_plain_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](LINES))

    def load(name: str, cache: Path = tmp_path / "cache") -> Any:
        path = str(tmp_path / name)
        config = DatasetConfig(train_path=path, eval_path=path)
        return load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=cache)

    plain, first, second = load("a.jsonl", tmp_path / "plain"), load("a.jsonl.zst"), load("a.jsonl.zst")
    assert first.fingerprint == second.fingerprint == plain.fingerprint
    assert len(first.eval) == len(plain.eval)
    assert not any("training tokens: cached" in note for note in first.notes)
    assert any("training tokens: cached" in note for note in second.notes)


def test_train_takes_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "held.json.zst").write_bytes(COMPRESS[".zst"](ARRAY))
    done = sparseft(
        tmp_path, "train", "--json", "method=s2ft", "dataset=json", "dataset.train_path=train.jsonl.gz",
        "dataset.eval_path=held.json.zst", "trainer.max_steps=1", "trainer.gradient_accumulation=1",
    )  # fmt: skip
    assert done.json["steps"] == 1
