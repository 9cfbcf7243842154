"""Tables to records, one a row: parquet, Arrow, and text with separators (CSV, TSV). As `readers.py`, never a whole
file in memory."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseft.data.readers import Item, refuse_encoding
from sparseft.data.unpacking import FREE, RATIO, unpacked
from sparseft.errors import UserError, shown

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TABLE_RECORDS = 256  # rows that become dicts at once
BUFFER = 2**16  # bytes of a parquet column that are read at once
LONGEST_FIELD = 2**26  # characters of a field of text: the csv module's own limit is 2**17


def parquet(file: Path, source: str) -> Iterator[Item]:
    """The rows of a parquet file, `BUFFER` bytes of each column at a time: a file may be one row group."""
    import pyarrow.parquet

    # pre_buffer, pyarrow's default, reads whole row groups
    opened = functools.partial(pyarrow.parquet.ParquetFile, pre_buffer=False, buffer_size=BUFFER)
    with _explained(source, "parquet"), opened(file) as table:
        _check_columns(table.schema_arrow.names, source)
        batches = (
            batch
            for group in range(table.num_row_groups)  # each alone, or the next ones are read ahead
            for batch in table.iter_batches(TABLE_RECORDS, row_groups=[group], use_threads=False)
        )
        yield from _rows(batches, file.stat().st_size)


def arrow(file: Path, source: str) -> Iterator[Item]:
    """The rows of an Arrow file, of which there are two kinds: with an index at the end (Feather), and as a stream, as
    `datasets` caches and saves its sets."""
    import pyarrow

    with _explained(source, "Arrow"), pyarrow.OSFile(str(file)) as content:
        if content.read(6) == b"ARROW1":
            indexed = pyarrow.ipc.open_file(content)
            schema, batches = indexed.schema, map(indexed.get_batch, range(indexed.num_record_batches))
        else:
            content.seek(0)
            batches = pyarrow.ipc.open_stream(content)
            schema = batches.schema
        _check_columns(schema.names, source)
        yield from _rows(
            (batch.slice(start, TABLE_RECORDS) for batch in batches for start in range(0, len(batch), TABLE_RECORDS)),
            file.stat().st_size,
        )


class _explained:
    """Inside, what pyarrow says of a file that is none of its kind becomes a UserError that names `source`."""

    def __init__(self, source: str, kind: str) -> None:
        self.source, self.kind = source, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        # A damaged file can also make an OSError (of a codec), a UnicodeDecodeError or an OverflowError.
        wrong = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
        if isinstance(error, wrong) and not isinstance(error, UserError):
            reason = shown(str(error).partition("\n")[0].rstrip("."), 300)
            raise UserError(f"{self.source} is not a readable {self.kind} file: {reason}.") from error


def _check_columns(names: list[str], source: str) -> None:
    # A spreadsheet may leave columns without a name behind the others, which nothing uses.
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{source}: there are two columns '{shown(twice[0])}'; which of both is meant?")


def _rows(batches: Iterator[Any], size: int) -> Iterator[Item]:
    """The rows of Arrow's batches; ValueError where a file of `size` bytes unfolds beyond measure."""
    number = unfolded = 0
    for batch in batches:
        unfolded += batch.nbytes
        if unfolded > max(FREE, RATIO * size) or number > max(FREE, 64 * size):
            raise ValueError(f"its {size:,} bytes unfold to more than {unfolded:,}")
        share = batch.nbytes // max(1, batch.num_rows)
        for item in batch.to_pylist():
            number += 1
            yield number, without_nulls(item), share


def without_nulls(item: dict[str, Any]) -> dict[str, Any]:
    """A row without the empty fields of the objects in it: the structs of a column all have the same fields, so a tool
    call that lacks an argument of another call gets it as null."""
    return {key: _present(value) for key, value in item.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return [_present(each) for each in value]
    return value


def comma_separated(file: Path, source: str) -> Iterator[Item]:
    """`_separated` by commas."""
    return _separated(file, source, ",")


def tab_separated(file: Path, source: str) -> Iterator[Item]:
    """`_separated` by tabs."""
    return _separated(file, source, "\t")


def _separated(file: Path, source: str, separator: str) -> Iterator[Item]:
    """One record a row, its fields named by the first row, all of them text. A quoted field may hold separators and
    lines. The number is that of the line that the row begins on."""
    csv.field_size_limit(LONGEST_FIELD)
    with unpacked(file, source) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=separator, strict=True)
        names: list[str] = []
        before = 0
        try:
            for row in rows:
                line, before = before + 1, rows.line_num
                if not row:  # a blank line
                    continue
                if not names:
                    names = [name.strip() for name in row]
                    _check_columns(names, source)
                    other = next((c for c in _SEPARATORS if c != separator and c in names[0]), None)
                    if len(names) == 1 and other is not None:
                        raise UserError(
                            f"{source}: the first line names one column, '{shown(names[0])}': its fields look "
                            f"separated by {_SEPARATORS[other]}; expected {_SEPARATORS[separator]}."
                        )
                    continue
                if len(row) != len(names):
                    raise UserError(
                        f"{source}, line {line}: {len(row)} fields, but the first line names {len(names)} "
                        f"({shown(', '.join(names), 300)}); a field that holds a separator or a line break is quoted."
                    )
                yield line, dict(zip(names, row, strict=True)), sum(map(len, row))
        except UnicodeDecodeError:
            refuse_encoding(file, source)
            raise
        except csv.Error as error:
            raise UserError(
                f"{source}, line {before + 1}: broken row ({error}); expected fields as CSV has."
            ) from error
