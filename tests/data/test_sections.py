"""Long texts: cut in sections and pieces, tokenised as if they were whole, in bounded memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.data import encoding, readers, records, sections
from sparseft.data.encoding import Encoder
from sparseft.data.formats import Example
from sparseft.data.sources import open_source
from sparseft.errors import UserError
from support.data import load, make_tokenizer, peaks, write

STYLES = ["bytes", "prepend", "metaspace", "prefix_space"]
LINES = [f"{n} é to Zürich, the  end.\n   {word} Answer: the end\n\t☃ ok" for n, word in enumerate(["so", "</s>"] * 9)]
BOOK = "\n".join(LINES)


made = functools.cache(make_tokenizer)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 60)
    monkeypatch.setattr(encoding, "TOGETHER", 90)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    for module in (sections, encoding):
        monkeypatch.setattr(module, "CONTEXT", 24)


@pytest.fixture
def short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sections, readers):
        monkeypatch.setattr(module, "LONGEST", 150)
    monkeypatch.setattr(sections, "CONTEXT", 24)


def whole_ids(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def predicted(data: Any) -> list[int]:
    return [label for item in data for label in item["labels"] if label != -100]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", [BOOK, BOOK.replace("\n", " "), BOOK.replace("\n", "").replace(" ", "")])
def test_pieces_give_the_tokens_of_the_whole(style: str, text: str, short_pieces: None) -> None:
    """Of lines, of one line, and of what has no white space to cut at."""
    tokenizer = made(style)
    encoder = Encoder(tokenizer)
    assert len(list(encoder._cuts(text))) > 8
    (segments,) = encoder.encode([Example([(text, True)], "here")])
    assert [token for ids, _ in segments for token in ids] == tokenizer(text)["input_ids"]


PARTS = st.sampled_from(["\n", " ", "  ", "the end", "</s>", "é", "☃", ":\n", "Answer", "\r", "."])


@pytest.mark.parametrize("style", STYLES)
@given(parts=st.lists(PARTS, max_size=60))
@settings(deadline=None, max_examples=40)
def test_pieces_of_any_text_give_the_tokens_of_the_whole(style: str, parts: list[str]) -> None:
    tokenizer = made(style)
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", 40)
        (segments,) = Encoder(tokenizer).encode([Example([(text, True)], "here")])
    assert [token for ids, _ in segments for token in ids][len(Encoder(tokenizer).prefix) :] == tokenizer(
        text, add_special_tokens=False
    )["input_ids"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_sections_of_a_document_predict_each_of_its_tokens_once(
    tmp_path: Path, style: str, suffix: str, short_sections: None, short_pieces: None
) -> None:
    """As the whole document would, behind the token before; BOS and EOS stand at its ends alone."""
    tokenizer = made(style)
    path = write(tmp_path / f"a.{suffix}", BOOK if suffix == "txt" else [{"text": BOOK}])
    loaded = load(path, tokenizer, max_length=20)
    assert predicted(loaded.train) == whole_ids(tokenizer, BOOK)[1:]
    starts = [item["input_ids"][0] for item in loaded.train]
    lasts = [item["input_ids"][-1] for item in loaded.train]
    assert starts == [tokenizer.bos_token_id, *lasts[:-1]]
    records = "9 training records" if suffix == "txt" else "1 training record"
    assert any(note.startswith(f"{records} from ") for note in loaded.notes), loaded.notes


def test_a_text_no_longer_than_a_section_is_one_record(tmp_path: Path, tokenizer: Any, short_sections: None) -> None:
    path = write(tmp_path / "a.txt", "\n\n".join(["a" * 150, "b" * 151]))
    items = open_source(path).first(9).items
    assert [(item["text"], item.before, item.more) for item in items] == [
        ("a" * 150, "", False), ("b" * 150, "", True), ("b", "b" * 24, False)
    ]  # fmt: skip


def documents(content: str) -> list[tuple[int, str]]:
    """What a text file holds, and on which line each document begins."""
    found: list[tuple[int, str]] = []
    blank = True
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip() and blank:
            found.append((number, line.removesuffix("\r")))
        elif line.strip():
            found[-1] = (found[-1][0], found[-1][1] + "\n" + line.removesuffix("\r"))
        blank = not line.strip()
    return found


TEXTS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " ", "\t", "word", "x" * 30, "é", "☃", "\u2028"])


@given(parts=st.lists(TEXTS, max_size=40), longest=st.integers(2, 60))
@settings(deadline=None, max_examples=100)
def test_sections_are_the_documents_of_the_file(tmp_path_factory: Any, parts: list[str], longest: int) -> None:
    content = "".join(parts)
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        for module in (sections, readers):
            patch.setattr(module, "LONGEST", longest)
        found = list(readers.plain_text(file, "a.txt"))
    joined: list[tuple[int, str]] = []
    lines = content.split("\n")
    for number, section, size in found:
        text = section["text"]
        assert size == len(text) <= longest
        assert section.before == (joined[-1][1][-sections.CONTEXT :] if section.before else "")
        if section.before:
            assert number == joined[-1][0] + joined[-1][1].count("\n")
            joined[-1] = (joined[-1][0], joined[-1][1] + text)
        else:
            joined.append((number, text))
        assert text.split("\n")[0].rstrip("\r") in lines[number - 1]
    followed = [bool(after.before) for _, after, _ in found[1:]]
    assert [section.more for _, section, _ in found] == [*followed, False][: len(found)]
    if all(line.strip() or len(line) + 1 < longest for line in lines):  # a longer blank line is text
        assert joined == documents(content)


def test_a_section_of_white_space_alone_ends_its_document(
    tmp_path: Path, tokenizer: Any, short_sections: None, short_pieces: None
) -> None:
    """At the end of a document and within it; without it no EOS would be learnt."""
    for text in ("x" * 150 + "\u3000", "x" * 150 + "\u3000" * 150 + "y" * 30):
        loaded = load(write(tmp_path / "a.txt", text), tokenizer, max_length=4096, eval_fraction=0.0)
        assert loaded.train[-1]["labels"][-1] == tokenizer.eos_token_id
        assert not loaded.warnings


def test_a_long_text_without_blank_lines_is_no_conversation(
    tmp_path: Path, tokenizer: Any, short_sections: None
) -> None:
    file = write(tmp_path / "a.txt", "### Human: a\n### Assistant: b\n" * 20)
    with pytest.raises(UserError, match="without a blank line is no single guanaco record; put blank lines"):
        load(file, tokenizer, max_length=64, format="guanaco")


def test_a_document_is_cut_before_a_line_then_before_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "LONGEST", 20)
    assert [part["text"] for part in sections.sections(["first line\nsecond ", "line\n third\nfourth one"])] == [
        "first line\n", "second line\n third\n", "fourth one"
    ]  # fmt: skip
    assert [part["text"] for part in sections.sections(["words  of one long line"])] == ["words  of one long", " line"]


def test_bytes_that_are_no_utf8_are_found_behind_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 4)
    content = "é☃\n".encode() * 5 + b"ok \xe2\x98\n"
    (tmp_path / "a.txt").write_bytes(content)
    place = content.index(b"\xe2\x98\n")
    with pytest.raises(UserError, match=rf"a.txt, line 6: not UTF-8 text \(byte {place}\)"):
        list(open_source(str(tmp_path / "a.txt")).chunks())


def test_the_held_out_share_is_that_of_the_text(tmp_path: Path, tokenizer: Any) -> None:
    """Of a book beside its title page too, of which one record of two would be everything or nothing."""
    for name, text in (("book", BOOK * 9), ("titled", "The end\n\n" + BOOK * 9)):
        loaded = load(write(tmp_path / f"{name}.txt", text), tokenizer, max_length=20, eval_fraction=0.1)
        share = loaded.eval.num_tokens / (loaded.eval.num_tokens + loaded.train.num_tokens)
        assert 0.08 < share < 0.12, name


def test_of_several_texts_whole_ones_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"the book of {number}\n" + BOOK for number in range(10)]
    loaded = load(write(tmp_path / "a.txt", "\n\n".join(texts)), tokenizer, max_length=20, eval_fraction=0.05)
    lengths = [len(part) * len(texts) for part in (loaded.eval, loaded.train)]
    assert lengths[0] * 9 == lengths[1]


def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    """5 MiB of one document, of lines or of one line, after 1 MiB of small ones; whole, each MiB would take 100."""
    for name, text in (("small", "it was once upon\n\n" * 2**16), ("lines", "it was once\n" * (2**19 * 5 // 6))):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "line.txt").write_text("it was once " * (2**19 * 5 // 6))
    small, *large = [tmp_path / f"{name}.txt" for name in ("small", "lines", "line")]
    for name, kibibytes, tokens in peaks(tmp_path / "cache", [small], large):
        assert tokens > 1_200_000, name
        assert kibibytes < 200 * 1024, f"{name}: {kibibytes / 1024:.0f} MiB more"


def test_what_a_stream_holds_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order and with the content that it had: as if all that waits were in memory."""
    text = "".join(f"{number} and a line of words, as many as there are.\n" for number in range(40_000))
    file = write(tmp_path / "book.txt", text + "\n\n" + "\n\n".join(f"short {number}" for number in range(90)))
    for module in (sections, readers):
        monkeypatch.setattr(module, "LONGEST", 2**15)
    monkeypatch.setattr(records, "BUFFER", 64)

    def read() -> list[list[tuple[str, str]]]:
        chunks = open_source(file, streaming=True, shuffle=3).chunks(100)
        return [[(chunk.where(at), item["text"]) for at, item in enumerate(chunk.items)] for chunk in chunks]

    monkeypatch.setattr(records, "LARGE", 2**30)
    in_memory = [each for chunk in read() for each in chunk]
    monkeypatch.setattr(records, "LARGE", 2**14)
    monkeypatch.setattr(records, "CHUNK_BYTES", 2**16)
    chunks = read()
    assert [each for chunk in chunks for each in chunk] == in_memory and len(in_memory) == 100
    assert max(sum(len(text) for _, text in chunk) for chunk in chunks) < 2**16 + 2**15
    kept: list[int] = []
    dumps = records.pickle.dumps
    monkeypatch.setattr(records.pickle, "dumps", lambda item: kept.append(len(item["text"])) or dumps(item))
    read()
    assert sum(kept) > 2**20 and min(kept) > 2**14  # the long ones, and none of the short ones
    monkeypatch.setattr(records.tempfile, "tempdir", str(tmp_path / "files"))
    with pytest.raises(UserError, match=r"cannot be written to \S*files: No such file.*name another folder in TMPDIR"):
        read()  # as where the disk is full
    monkeypatch.setattr(records, "LARGE", 2**30)
    assert len(read()) > 1  # without a large record there is no folder
