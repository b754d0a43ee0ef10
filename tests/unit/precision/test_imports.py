"""What the configuration and the controller ask of formats is answered without PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["layers", "recipe", "quantization_config", "of_run", "number_types", "base"])
def test_recipes_need_no_pytorch(module: str) -> None:
    program = f"import sys, miles.precision.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
