"""Importing the shared library brings in nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "redis", "pyarrow", "pandas", "jinja2", "tokenizers", "fastapi"]


def modules_after(statement: str) -> set[str]:
    """Top-level modules and packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["miles", "miles.types", "miles.types.convert", "miles.data"])
def test_no_heavy_module_is_imported(module: str) -> None:
    assert not modules_after(f"import {module}").intersection(HEAVY)


def test_miles_itself_imports_nothing_but_the_standard_library() -> None:
    assert not modules_after("import miles").intersection([*HEAVY, "numpy", "pydantic", "grpc", "google.protobuf"])


def test_sample_types_need_no_protobuf() -> None:
    assert not modules_after("import miles.types").intersection(["google.protobuf", "grpc", "pydantic"])
