"""Address files."""

from __future__ import annotations

import os
import pathlib

import pytest

from miles.rpc import ExitCode, ServiceExit
from miles.rpc.address_file import write_address


def test_a_restarted_service_replaces_its_address_and_leaves_nothing_else(tmp_path: pathlib.Path) -> None:
    for address in ("127.0.0.1:1", "http://[::1]:8000"):
        write_address(tmp_path / "gateway.address", address)
        assert (tmp_path / "gateway.address").read_text() == address
    assert os.listdir(tmp_path) == ["gateway.address"]


@pytest.mark.parametrize("text", ["two words", "a\nb\n", "x" * 1000])
def test_another_file_is_not_written_over(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ServiceExit, match="another file is there") as refused:
        write_address(tmp_path / "data.jsonl", "127.0.0.1:1")
    assert refused.value.code is ExitCode.BAD_CONFIG
    assert (tmp_path / "data.jsonl").read_text() == text
