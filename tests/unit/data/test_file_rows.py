"""Rows of prompt files: JSONL, Parquet, slices, and what is wrong with them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data import DataError, parse_file_slice, read_rows

ROWS = [{"input": str(i)} for i in range(5)]


@pytest.fixture(params=["jsonl", "parquet"])
def five_rows(request: pytest.FixtureRequest, tmp_path: pathlib.Path, write_jsonl: Callable[..., str]) -> str:
    """A file of five rows, of either type."""
    if request.param == "jsonl":
        return write_jsonl(*ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "prompts.parquet")
    return str(tmp_path / "prompts.parquet")


@pytest.mark.parametrize(
    ("suffix", "start", "end"),
    [
        ("", 0, 5),
        ("@[:]", 0, 5),
        ("@[1:3]", 1, 3),
        ("@[2:]", 2, 5),
        ("@[:4]", 0, 4),
        ("@[-2:]", 3, 5),
        ("@[:-1]", 0, 4),
        ("@[0:5]", 0, 5),
        ("@[-5:-4]", 0, 1),
    ],
)
def test_a_slice_takes_its_rows(five_rows: str, suffix: str, start: int, end: int) -> None:
    assert [record.values for record in read_rows(five_rows + suffix)] == ROWS[start:end]


@pytest.mark.parametrize("suffix", ["@[0:6]", "@[5:]", "@[3:3]", "@[3:1]", "@[-6:]", "@[:0]", "@[:-5]"])
def test_a_slice_out_of_range_is_refused(five_rows: str, suffix: str) -> None:
    with pytest.raises(DataError, match=r"is out of range: .* has 5 rows"):
        read_rows(five_rows + suffix)


@pytest.mark.parametrize("suffix", ["@[a:b]", "@[1]", "@[1:2:3]", "@[-:]", "@[1:2", "@[]", "@[1:2]x"])
def test_a_slice_that_is_none_is_refused(five_rows: str, suffix: str) -> None:
    with pytest.raises(DataError, match=r"not a slice; write FILE@\[start:end\]"):
        read_rows(five_rows + suffix)


def test_a_file_may_be_named_like_a_slice(tmp_path: pathlib.Path) -> None:
    odd = tmp_path / "a@[x].jsonl"
    odd.write_text('{"input": "x"}\n')
    assert read_rows(str(odd))[0].values == {"input": "x"}
    assert parse_file_slice(f"{odd}@[0:1]").path == odd


def test_a_record_knows_its_line(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(ROWS[0], "", "   ", ROWS[1])
    assert [record.where for record in read_rows(path)] == [f"{path}, line 1", f"{path}, line 4"]
    assert [record.where for record in read_rows(path + "@[1:]")] == [f"{path}, line 4"]


def test_a_record_knows_its_row(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert [record.where for record in read_rows(path + "@[3:]")] == [f"{path}, row 4", f"{path}, row 5"]


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\r\n{"input": "b"}\r\n')
    assert [record.values["input"] for record in read_rows(str(path))] == ["a", "b"]


def test_unicode_line_separators_do_not_end_a_row(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read_rows(str(path))[0].values == {"input": "a\u2028b\u0085c"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"input": ', "not JSON: Expecting value at column 10"),
        ("{'input': 1}", "not JSON: Expecting property name"),
        ('{"a": 1} {"b": 2}', "not JSON: Extra data at column 10"),
        ("[1]", "a JSON list; expected an object"),
        ("3", "a JSON int; expected an object"),
        ("[" * 100000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_malformed_line_is_named(write_jsonl: Callable[..., str], line: str, problem: str) -> None:
    path = write_jsonl(ROWS[0], line, ROWS[1])
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: {problem}")
    assert read_rows(path + "@[0:1]")[0].values == ROWS[0]


def test_a_line_that_is_not_utf8_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"input": "a"}\n{"input": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not JSON: .*can't decode byte 0xff"):
        read_rows(str(path))


def test_all_malformed_lines_are_named_at_once_up_to_ten(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(*["{"] * 12)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].rpartition(" ")[2] for line in lines[:10]] == [str(i) for i in range(1, 11)]
    assert lines[10:] == ["... and 2 more"]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path: pathlib.Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"prompts\.jsonl is empty"):
        read_rows(str(path))


def test_an_empty_parquet_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "prompts.parquet")
    pq.write_table(pa.table({"input": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=r"prompts\.parquet is empty"):
        read_rows(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"prompt file .*nowhere\.jsonl does not exist"):
        read_rows(str(tmp_path / "nowhere.jsonl@[0:2]"))


def test_a_folder_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        read_rows(str(tmp_path))


def test_an_unknown_file_type_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompts.csv").write_text("input\n1\n")
    with pytest.raises(DataError, match=r"unknown file type \.csv; allowed: \.jsonl, \.parquet"):
        read_rows(str(tmp_path / "prompts.csv"))


def test_a_parquet_file_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompts.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"prompts\.parquet is not a readable Parquet file"):
        read_rows(str(tmp_path / "prompts.parquet"))
