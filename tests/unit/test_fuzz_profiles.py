"""What property tests draw, seen from runs of pytest in processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

SUPPORT = pathlib.Path(__file__).parents[1] / "support"

CONFTEST = """
import pathlib
import found_examples
found_examples.FOLDER = pathlib.Path(__file__).parent / "found"
from fuzz_profiles import pytest_collection_modifyitems, pytest_configure
"""

PROPERTIES = """
import json, os
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

def record(name, value):
    with open(os.environ["DRAWN"], "a") as file:
        file.write(json.dumps([name, value]) + "\\n")

@given(st.lists(st.text() | st.integers() | st.floats(allow_nan=False), max_size=4))
def test_default_settings(value):
    record("default", value)

@pytest.mark.parametrize("case", ["a", "b"])
@settings(max_examples=10)
@given(value=st.integers())
def test_own_settings(case, value):
    record(case, value)
    assert value < int(os.environ.get("LIMIT", value + 1))

class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        record("machine", "new")

    @rule(value=st.integers())
    def step(self, value):
        record("machine", value)

TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=10, stateful_step_count=5)
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with property tests."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_properties.py").write_text(PROPERTIES)
    return tmp_path


def draw(folder: pathlib.Path, *options: str, failed: int = 0, **changes: str) -> dict[str, list[Any]]:
    """Run the property tests, of which some fail; what each drew."""
    drawn = folder / "drawn"
    drawn.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "MILES_FUZZ")} | {
        "PYTHONPATH": str(SUPPORT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "DRAWN": str(drawn),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_hypothesis_pytestplugin", *options]
    ran = subprocess.run(command, cwd=folder, env=environment | changes, capture_output=True, text=True)
    assert (f"{failed} failed" in ran.stdout) == (failed > 0), ran.stdout + ran.stderr
    assert ran.returncode == (1 if failed else 0), ran.stdout + ran.stderr
    by_test: dict[str, list[Any]] = {}
    for line in drawn.read_text().splitlines():
        name, value = json.loads(line)
        by_test.setdefault(name, []).append(value)
    return by_test


def test_every_run_draws_the_same(folder: pathlib.Path) -> None:
    first = draw(folder, PYTHONHASHSEED="1")
    assert (len(first["default"]), len(first["a"]), first["machine"].count("new")) == (100, 10, 10)

    # Other imports, an environment in which Hypothesis takes other defaults, and fewer tests.
    (folder / "constants.py").write_text(f"CONSTANTS = {[70_001 + 7 * number for number in range(500)]}\n")
    (folder / "conftest.py").write_text(CONFTEST + "import constants\n")
    again = draw(folder, "-k", "default or Machine", PYTHONHASHSEED="2", CI="true")
    assert again == {name: first[name] for name in ("default", "machine")}


def test_fuzzing_draws_more_and_what_it_finds_is_replayed(folder: pathlib.Path) -> None:
    draw(folder, "-k", "own_settings", failed=2, MILES_FUZZ="20", LIMIT="12345")
    found = [path for path in (folder / "found").rglob("*") if path.is_file()]
    assert len(found) == 2, "the smallest of each test, and nothing else"

    # They stay, although they no longer fail: neither while fuzzing nor otherwise.
    fuzzed = draw(folder, "-k", "own_settings or Machine", MILES_FUZZ="20")
    usual = draw(folder, "-k", "own_settings or Machine")
    assert {fuzzed["a"][0], fuzzed["b"][0], usual["a"][0], usual["b"][0]} == {12345}
    assert all(path.exists() for path in found)

    assert (len(usual["a"]), len(fuzzed["a"])) == (10, 200)
    assert usual["machine"].count("new") < 20
    assert fuzzed["machine"].count("new") >= 200, "a few more where Hypothesis gives up an example"
    assert fuzzed["a"][1:10] != usual["a"][1:]
