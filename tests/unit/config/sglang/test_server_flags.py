from __future__ import annotations

import os
import pathlib
import subprocess

import pytest
from sglang_kit import CPU_PYTHON, have_sglang

from miles.config.sglang import tables
from miles.config.sglang.server_flags import find, server_flags

TOOL = pathlib.Path(__file__).parents[4] / "tools" / "sglang_flags.py"


@pytest.mark.engine
@pytest.mark.skipif(not have_sglang(), reason="needs SGLang")
def test_the_table_is_that_of_the_installed_sglang() -> None:
    python = str(CPU_PYTHON) if "MILES_TEST_SGLANG" in os.environ else "python"
    done = subprocess.run([python, str(TOOL), "--check"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tp_size", "tp_size"),
        ("tensor-parallel-size", "tp_size"),
        ("ep", "ep_size"),
        ("mem_frac", "mem_fraction_static"),
        ("cuda_graph_max_bs", None),  # the beginning of two
        ("nothing_like_it", None),
    ],
)
def test_a_flag_is_found_by_its_names_and_by_the_beginning_of_one(name: str, key: str | None) -> None:
    flag = find(name)
    assert (flag and flag.key) == key


def test_tables_name_flags_that_there_are() -> None:
    known = server_flags()
    assert [key for key in (*tables.SETTINGS, *tables.RENAMED.values()) if key not in known] == []
    assert [key for key in tables.RENAMED if key in known] == []
    assert [prefix for prefix in tables.REFUSED_PREFIXES if not any(key.startswith(prefix) for key in known)] == []
