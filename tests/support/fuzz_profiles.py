"""Which examples property tests draw: the same ones in every run, or new ones and more of them when fuzzing.

Both replay the examples that failed before. conftest.py takes over the two hooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import found_examples
import pytest
from found_examples import FoundExamples
from hypothesis import is_hypothesis_test, seed, settings
from hypothesis.database import ReadOnlyDatabase
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

TIMES = int(os.environ.get("MILES_FUZZ", "0"))
"""How many times as many examples fuzzing draws; 0: no fuzzing."""


def pytest_configure() -> None:
    # On some hosts for continuous integration, Hypothesis starts from a profile of its own.
    default = settings.get_profile("default")
    found = FoundExamples(found_examples.FOLDER)
    if TIMES:
        settings.register_profile("fuzz", default, deadline=None, database=found, print_blob=True)
        settings.load_profile("fuzz")
    else:
        settings.register_profile("fixed", default, deadline=None, database=ReadOnlyDatabase(found))
        settings.load_profile("fixed")
        # Hypothesis also draws constants from the source of whatever modules are imported; then a test on its own would
        # not draw what it draws among others.
        providers._get_local_constants = Constants


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = [item for item in items if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)]
    change = draw_more if TIMES else draw_the_same
    # The cases of a parametrized test share a function.
    for function, case in {(getattr(test.obj, "__func__", test.obj), test.cls) for test in tests}:
        change(function, case)


def draw_the_same(function: Callable[..., None], case: Any) -> None:
    """Fix the seed: `derandomize` and `--hypothesis-seed` would do so, too, but replay no examples."""
    machine = getattr(function, "_hypothesis_state_machine_class", None)
    if machine is not None:
        seed(0)(machine)
    else:
        kept = settings_of(function)
        seed(0)(function)  # this takes the database away, too
        function._hypothesis_internal_use_settings = kept


def draw_more(function: Callable[..., None], case: Any) -> None:
    """Multiply the examples of a property test, wherever their number was set."""
    if hasattr(function, "_hypothesis_state_machine_class"):
        case.settings = settings(case.settings, max_examples=TIMES * case.settings.max_examples)
    else:
        old = settings_of(function)
        function._hypothesis_internal_use_settings = settings(old, max_examples=TIMES * old.max_examples)


def settings_of(function: Any) -> settings:
    """The settings that a property test runs with."""
    return function._hypothesis_internal_use_settings
