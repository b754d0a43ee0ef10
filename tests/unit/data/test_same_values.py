"""The same rows give the same prompts, labels, metadata and tools from JSONL and from Parquet."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data import DataError, PromptFields, read_rows
from miles.data.prompt_fields import PromptRow, parse_row

FIELDS = PromptFields(label_key="label")
Both = Callable[..., tuple[list[PromptRow], list[PromptRow]]]


@pytest.fixture
def both(tmp_path: pathlib.Path) -> Both:
    """Parses rows from JSONL and from Parquet: both(rows, table=None), where `table` has them in other types."""

    def parse(rows: list[dict[str, Any]], table: pa.Table | None = None) -> tuple[list[PromptRow], list[PromptRow]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows) if table is None else table, tmp_path / "rows.parquet")
        jsonl, parquet = (
            [parse_row(row.values, FIELDS) for row in read_rows(str(tmp_path / name))]
            for name in ("rows.jsonl", "rows.parquet")
        )
        return jsonl, parquet

    return parse


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool's description."""
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def test_tools_metadata_and_messages_lack_the_keys_of_their_neighbours(both: Both) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    rows: list[dict[str, Any]] = [
        {
            "input": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}],
            "label": "1",
            "tools": [tool("weather", city={"type": "string"}), tool("add", x={"type": "integer", "enum": [1, None]})],
            "metadata": {"level": 1},
        },
        {
            "input": [{"role": "user", "name": "b", "content": "b"}],
            "label": None,
            "tools": [],
            "metadata": {"source": "web"},
        },
    ]
    jsonl, parquet = both(rows)
    assert jsonl == parquet
    assert jsonl[0].tools == rows[0]["tools"]
    assert jsonl[0].prompt == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call], "content": None},
    ]
    assert jsonl[1].metadata == {"source": "web"}


def test_nulls_of_jsonl_stay_and_those_of_parquet_structs_do_not(both: Both) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": None, "y": 1}}}
    row = {
        "input": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "tool_calls": [call]}],
        "label": {"x": None, "y": 1},
        "tools": [tool("add", x={"type": "integer", "default": None})],
        "metadata": {"x": None, "list": [None]},
    }
    [jsonl], [parquet] = both([row])
    assert jsonl.prompt == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call], "content": None},
    ]
    assert jsonl.label == '{"x": null, "y": 1}'
    assert jsonl.tools == row["tools"]
    assert jsonl.metadata == {"x": None, "list": [None], "tools": jsonl.tools}
    assert parquet.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"y": 1}  # type: ignore[index]
    assert parquet.label == '{"y": 1}'
    assert parquet.tools == [tool("add", x={"type": "integer"})]
    assert parquet.metadata == {"list": [None], "tools": parquet.tools}


def test_a_message_key_that_is_null_is_missing_in_either_kind_of_file(both: Both) -> None:
    jsonl, parquet = both([{"input": [{"role": "user", "content": "a", "tool_calls": None}], "label": "1"}])
    assert jsonl == parquet
    assert jsonl[0].prompt == [{"role": "user", "content": "a"}]


def test_a_null_in_a_parquet_map_stays(both: Both) -> None:
    column = pa.array([[("x", None), ("y", 1)]], pa.map_(pa.string(), pa.int64()))
    row = {"input": "q", "label": "1", "metadata": {"x": None, "y": 1}}
    jsonl, parquet = both([row], pa.table({"input": ["q"], "label": ["1"], "metadata": column}))
    assert jsonl == parquet
    assert jsonl[0].metadata == {"x": None, "y": 1}


def test_json_text_keeps_its_nulls(both: Both) -> None:
    tools = [tool("add", x={"default": None})]
    jsonl, parquet = both([{"input": "q", "label": "1", "tools": json.dumps(tools), "metadata": '{"hint": null}'}])
    assert jsonl == parquet
    assert jsonl[0].tools == tools
    assert jsonl[0].metadata == {"hint": None, "tools": tools}


@pytest.mark.parametrize(
    ("label", "column", "text"),
    [
        (1e-05, pa.array([1e-05]), "0.00001"),
        (2e16, pa.array([2e16]), "20000000000000000"),
        (3.0, pa.array([3.0]), "3"),
        (18, pa.array([18.0]), "18"),  # an integer column with nulls, as pandas writes it
        (0.1, pa.array([0.1], pa.float32()), "0.1"),
        (18.5, pa.array([Decimal("18.50")]), "18.5"),
        (2**53 + 1, pa.array([2**53 + 1]), "9007199254740993"),
        (2**63, pa.array([2**63], pa.uint64()), "9223372036854775808"),
        (True, pa.array([True]), "true"),
        ("B", pa.array(["B"]).dictionary_encode(), "B"),
        ("B", pa.array([b"B"]), "B"),
        ("é", pa.array(["é"], pa.large_string()), "é"),
        ("2024-05-01", pa.array([datetime.date(2024, 5, 1)]), "2024-05-01"),
        ("2024-05-01T02:03:04", pa.array([datetime.datetime(2024, 5, 1, 2, 3, 4)]), "2024-05-01T02:03:04"),
        ([[1, 2], [3]], pa.array([[[1, 2], [3]]]), "[[1, 2], [3]]"),
        (None, pa.array([None]), None),
    ],
)
def test_labels_of_every_type_are_the_same_text(both: Both, label: Any, column: pa.Array, text: str | None) -> None:
    jsonl, parquet = both([{"input": "q", "label": label}], pa.table({"input": ["q"], "label": column}))
    assert [row.label for row in jsonl] == [row.label for row in parquet] == [text]


@pytest.mark.parametrize(
    ("metadata", "column"),
    [
        ({"a": 1, "b": 2}, pa.array([[("a", 1), ("b", 2)]], pa.map_(pa.string(), pa.int64()))),
        ({"x": 0.1}, pa.array([{"x": 0.1}], pa.struct([("x", pa.float32())]))),
        ({"x": [0.1, None]}, pa.array([{"x": [0.1, None]}], pa.struct([("x", pa.list_(pa.float32()))]))),
        ({"x": 18.5}, pa.array([{"x": Decimal("18.50")}])),
        ({"x": "2024-05-01"}, pa.array([{"x": datetime.date(2024, 5, 1)}])),
        ({"x": 3.0, "y": 1e-05}, pa.array([{"x": 3.0, "y": 1e-05}])),
    ],
)
def test_metadata_of_every_type_are_the_same_json(both: Both, metadata: dict[str, Any], column: pa.Array) -> None:
    rows = [{"input": "q", "label": "1", "metadata": metadata}]
    jsonl, parquet = both(rows, pa.table({"input": ["q"], "label": ["1"], "metadata": column}))
    assert jsonl == parquet
    assert jsonl[0].metadata == metadata
    assert type(next(iter(jsonl[0].metadata.values()))) is type(next(iter(parquet[0].metadata.values())))


def test_a_number_keeps_all_its_digits(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "q", "label": 3.14159265358979323846}\n')
    assert parse_row(read_rows(str(path))[0].values, FIELDS).label == "3.14159265358979323846"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e99999999"])
def test_a_label_that_is_no_finite_number_is_refused(tmp_path: pathlib.Path, number: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"input": "q", "label": {number}}}\n')
    with pytest.raises(DataError, match="'label'"):
        parse_row(read_rows(str(path))[0].values, FIELDS)


def test_times_of_nanoseconds_are_read(tmp_path: pathlib.Path) -> None:
    when = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    nested = pa.StructArray.from_arrays([when], ["at"])
    pq.write_table(pa.table({"input": ["q"], "when": when, "nested": nested}), tmp_path / "rows.parquet")
    [row] = read_rows(str(tmp_path / "rows.parquet"))
    assert row.values["when"] == row.values["nested"]["at"] == "2023-11-14T22:13:20.123456"


@pytest.mark.parametrize("column", [pa.array([float("nan")]), pa.array([datetime.timedelta(1)]), pa.array([b"\xff"])])
def test_a_parquet_label_that_json_cannot_express_is_refused(tmp_path: pathlib.Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"input": ["q"], "label": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="'label'"):
        parse_row(read_rows(str(tmp_path / "rows.parquet"))[0].values, FIELDS)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        ('{"input": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"input": "a"}\n'.encode("utf-16-le"), "UTF-16"),
        (b'[{"input": "a"},\n{"input": "b"}]', "one JSON array"),
        (b'[\n{"input": "a"}\n]', "one JSON array"),
        (b"PAR1\x15\x04\n", "binary file"),
    ],
)
def test_a_file_of_another_format_is_named_once(tmp_path: pathlib.Path, content: bytes, problem: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl has no JSON object in each line: .*{problem}") as caught:
        read_rows(str(tmp_path / "rows.jsonl"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_that_occurs_twice_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "label": 1, "label": 2}\n')
    with pytest.raises(DataError, match="line 1: not JSON: the key 'label' occurs twice"):
        read_rows(str(tmp_path / "rows.jsonl"))
