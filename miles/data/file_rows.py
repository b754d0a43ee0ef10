"""Reads rows of a JSONL or Parquet file, each with its place in the file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from decimal import Decimal
from typing import Any

from miles.data.errors import DataError, Faults
from miles.data.parquet_values import column_values, json_value

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<end>-?\d*)\]$", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class FileRow:
    """One row of a file."""

    where: str
    """File and line (JSONL) or row (Parquet), counted from 1, for error messages."""
    values: dict[str, Any]
    """Value by column name, as JSON; a number with decimals at the top is a Decimal, exactly as in the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileSlice:
    """A file and a slice of its rows, as in `file@[start:end]`."""

    path: pathlib.Path
    start: int | None = None
    end: int | None = None

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """Return the first row and the end of the slice in `num_rows` rows. Raises DataError when out of range."""
        start = 0 if self.start is None else self.start + num_rows * (self.start < 0)
        end = num_rows if self.end is None else self.end + num_rows * (self.end < 0)
        if num_rows == 0:
            raise DataError(f"{self.path} is empty; a prompt set has at least one row")
        if not 0 <= start < end <= num_rows:
            text = f"@[{'' if self.start is None else self.start}:{'' if self.end is None else self.end}]"
            raise DataError(
                f"slice {text} is out of range: {self.path} has {num_rows} row{'s' * (num_rows > 1)}; "
                f"0 <= start < end <= {num_rows} must hold (negative numbers count from the end)"
            )
        return start, end


def parse_file_slice(text: str) -> FileSlice:
    """Split `file@[start:end]`; both bounds may be left out or negative, as in a Python slice."""
    if match := _SLICE.match(text):
        start, end = (None if match[name] in ("", "-") else int(match[name]) for name in ("start", "end"))
        if "-" not in (match["start"], match["end"]):
            return FileSlice(pathlib.Path(match["path"]).expanduser(), start, end)
    if "@[" in text and not pathlib.Path(text).expanduser().exists():
        raise DataError(f"{text}: not a slice; write FILE@[start:end], e.g. prompts.jsonl@[0:1000]")
    return FileSlice(pathlib.Path(text).expanduser())


def read_rows(text: str) -> list[FileRow]:
    """Read the rows of a file named as in `parse_file_slice`.

    Raises DataError for a missing or empty file, a slice out of range, an unknown file type, or rows that are not
    JSON objects (all such rows of the slice at once, with their line numbers).
    """
    source = parse_file_slice(text)
    if not source.path.exists():
        raise DataError(f"prompt file {source.path} does not exist (working directory: {pathlib.Path.cwd()})")
    if not source.path.is_file():
        raise DataError(f"{source.path} is not a file; give one .jsonl or .parquet file")
    match source.path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _read_jsonl(source)
        case ".parquet":
            return _read_parquet(source)
        case suffix:
            raise DataError(f"{source.path}: unknown file type {suffix or '(none)'}; allowed: .jsonl, .parquet")


def _read_jsonl(source: FileSlice) -> list[FileRow]:
    with source.path.open("rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip(b" \t\r\n\xef\xbb\xbf")]
    if lines:
        _refuse_other_formats(source.path, lines[0][1])
    start, end = source.bounds(len(lines))
    rows = []
    faults = Faults()
    for number, line in lines[start:end]:
        where = f"{source.path}, line {number}"
        try:
            values = _parse_line(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
        except RecursionError:
            faults.add(f"{where}: nested too deeply")
        except json.JSONDecodeError as error:
            faults.add(f"{where}: not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:  # not UTF-8, a key that occurs twice, or a number with too many digits
            faults.add(f"{where}: not JSON: {error}")
        else:
            if isinstance(values, dict):
                rows.append(FileRow(where, values))
            else:
                faults.add(f"{where}: a JSON {type(values).__name__}; expected an object")
    faults.check()
    return rows


def _refuse_other_formats(path: pathlib.Path, first_line: bytes) -> None:
    """Raise DataError for files that are no lines of JSON at all, instead of a fault for each of their lines."""
    problem = None
    if first_line.startswith(b"\x1f\x8b"):
        problem = "it is compressed with gzip; unpack it (gunzip)"
    elif first_line.startswith((b"PAR1", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        problem = "it is a binary file; give Parquet files the ending .parquet, and unpack archives"
    elif first_line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first_line:
        problem = "it is not UTF-8 but probably UTF-16; save it as UTF-8"
    elif first_line.strip() == b"[" or first_line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[{"):
        problem = "it is one JSON array; write each row as an object on a line of its own (jq -c '.[]')"
    if problem is not None:
        raise DataError(f"{path} has no JSON object in each line: {problem}")


def _parse_line(text: str) -> Any:
    """Parse JSON; numbers with decimals are floats, but in the values of the object itself they are Decimals."""
    values = json.loads(text, parse_float=Decimal, object_pairs_hook=_object)
    if not isinstance(values, dict):
        return values
    return {key: value if isinstance(value, Decimal) else json_value(value) for key, value in values.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return values


def _read_parquet(source: FileSlice) -> list[FileRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {source.path} needs pyarrow: pip install 'miles[controller]'") from error
    try:
        table = pq.read_table(source.path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path} is not a readable Parquet file: {error}") from error
    start, end = source.bounds(table.num_rows)
    part = table.slice(start, end - start)
    columns: dict[str, list[Any]] = {}
    for name, column in zip(part.column_names, part.columns, strict=True):
        try:
            columns[name] = column_values(column)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{source.path}: the column {name!r} ({column.type}) cannot be read: {error}") from error
    if len(columns) < part.num_columns:
        raise DataError(f"{source.path} has two columns of one name: {', '.join(part.column_names)}")
    return [
        FileRow(f"{source.path}, row {start + i + 1}", {name: values[i] for name, values in columns.items()})
        for i in range(part.num_rows)
    ]
