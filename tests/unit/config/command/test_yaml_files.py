from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.command.flags import parse_command_line
from miles.config.command.yaml_files import read_file, write_text


def read(path: pathlib.Path, text: str) -> tuple[dict[str, Any], list[str]]:
    path.write_text(text, encoding="utf-8")
    settings, faults = read_file(str(path))
    return settings, [fault.problem for fault in faults]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("~", None),
        ("", None),
        ("null", None),
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-11-29", "2026-11-29"),
        ("0x10", "0x10"),
        ("'1e-6'", "1e-6"),
    ],
)
def test_plain_words_are_what_they_are_on_the_command_line(tmp_path: pathlib.Path, word: str, value: Any) -> None:
    assert read(tmp_path / "a.yaml", f"key: {word}\n") == ({"key": value}, [])


def test_numbers_that_are_not_finite_are_read_as_such(tmp_path: pathlib.Path) -> None:
    settings, _ = read(tmp_path / "a.yaml", "a: .nan\nb: -.inf\n")
    assert math.isnan(settings["a"])
    assert settings["b"] == -math.inf


def test_switches_take_yes_and_no(tmp_path: pathlib.Path) -> None:
    from config_cases import MINIMAL

    from miles.config import JobConfig

    settings, _ = read(tmp_path / "a.yaml", "use_tis: yes\ngateway: off\nname: no\nseed: 010\n")
    config = JobConfig.from_flat(MINIMAL | settings)
    assert (config.algorithm.use_tis, config.gateway.gateway) == (True, False)
    assert (config.services.name, config.train.seed) == ("no", 10)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", "it is not YAML of settings: a is given twice, in line 2, column 1"),
        ("a:\n\tb: 1\n", "found character '\\t' that cannot start any token, in line 2, column 1"),
        ("a: &x [1]\nb: *x\n", "*x stands for a list or mapping; write it out, in line 2, column 4"),
        ("a: &x [*x]\n", "*x stands for a list or mapping"),
        ("[" * 5000, "lists and mappings are nested too deep"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: !!int x\n", "invalid literal"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("- a\n", "it must map setting names to values"),
        ("text", "it must map setting names to values"),
        ("1: 2\n", "its key 1 is not text"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(tmp_path: pathlib.Path, text: str, problem: str) -> None:
    settings, problems = read(tmp_path / "a.yaml", text)
    assert settings == {}
    assert len(problems) == 1
    assert problem in problems[0]


def test_an_empty_file_has_no_settings_and_a_mark_of_byte_order_is_no_part_of_a_key(tmp_path: pathlib.Path) -> None:
    assert read(tmp_path / "a.yaml", "") == ({}, [])
    assert read(tmp_path / "a.yaml", "# nothing\n") == ({}, [])
    assert read(tmp_path / "a.yaml", "\ufeffa: 1\n") == ({"a": 1}, [])


def test_a_later_file_leaves_out_what_an_earlier_one_has(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text("rm_type: math\nlr: 1\n")
    (tmp_path / "b.yaml").write_text("rm_type: null\n")
    line = parse_command_line(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert line.flat == {"rm_type": None, "lr": 1}


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), min_size=1),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
        max_size=4,
    )
)
def test_what_is_written_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(write_text(settings), encoding="utf-8", newline="")
    assert read_file(str(path)) == (settings, [])
