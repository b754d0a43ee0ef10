"""INT4 weights are what compressed-tensors packs, and kernels for GPUs round as the formats' own code does."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest
from sglang_kit import CPU_PYTHON

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("MILES_TEST_SGLANG" not in os.environ, reason="needs what SGLang brings: make test-engines"),
]


def printed(script: str) -> dict[str, Any]:
    """What a script of the tests prints in SGLang's environment, which has compressed-tensors and Triton."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    command = [str(CPU_PYTHON), str(SUPPORT / script)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=600).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def test_packed_weights_are_those_of_compressed_tensors() -> None:
    found = printed("packed_weights.py")
    assert len(found) == 50
    assert not [name for name, equal in found.items() if not equal]


def test_interpreted_kernels_round_as_the_formats_do() -> None:
    found = printed("interpreted_kernels.py")
    assert len(found) == 65
    assert not [name for name, equal in found.items() if not equal]
