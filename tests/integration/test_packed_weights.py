"""INT4 weights are what compressed-tensors packs, and unpacks to what the trainer computed with."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest
from sglang_kit import CPU_PYTHON

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


@pytest.mark.engine
@pytest.mark.skipif(
    "MILES_TEST_SGLANG" not in os.environ, reason="compressed-tensors comes with SGLang: make test-engines"
)
def test_packed_weights_are_those_of_compressed_tensors() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    command = [str(CPU_PYTHON), str(SUPPORT / "packed_weights.py")]
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=300).stdout)
    assert len(found) == 50
    assert not [name for name, equal in found.items() if not equal]
