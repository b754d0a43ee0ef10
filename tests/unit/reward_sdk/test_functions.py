from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Iterator

import pytest

from miles.reward_sdk import RewardFunction, RewardLoadError, Source, functions, reward
from miles.reward_sdk.functions import load
from miles.services.reward.builtin import BUILTIN, sources


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, RewardFunction]]:
    """A registry of this test's own, and an import path that is put back."""
    monkeypatch.setattr(functions, "registered", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield functions.registered
    sys.modules.pop("user_rewards", None)


@pytest.fixture
def module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A module `user_rewards` in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "user_rewards.py"
    path.write_text(
        "from miles.reward_sdk import reward, serve\n"
        "@reward\ndef plain(sample): return 1.0\n"
        "@reward(name='whole', group=True)\ndef together(samples): return [1.0 for _ in samples]\n"
        "constant = 3\n"
        "serve(port=0)\n"
        "raise SystemExit('unreachable')\n"
    )
    return path


def test_a_decorated_function_is_registered_and_unchanged(registry: dict[str, RewardFunction]) -> None:
    @reward
    def mine(sample: object) -> float:
        return 1.0

    assert mine(None) == 1.0
    assert registry["mine"] == RewardFunction("mine", mine)


def test_two_functions_of_one_name_are_refused() -> None:
    reward(name="mine")(lambda sample: 0.0)
    with pytest.raises(RewardLoadError, match="'mine'"):
        reward(name="mine")(lambda sample: 1.0)


def test_a_script_registers_what_stands_above_serve(module: pathlib.Path) -> None:
    loaded = load([Source(str(module), script=True)])
    assert [(f.name, f.group) for f in loaded.values()] == [("plain", False), ("whole", True)]


def test_a_module_of_the_working_folder_is_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text("async def mine(sample): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    [function] = load([Source("user_rewards.mine")]).values()
    assert (function.name, function.is_async, function.group) == ("mine", True, False)


def test_partials_and_objects_know_whether_they_are_async() -> None:
    async def mine(scale: float, sample: object) -> float:
        return scale

    class Judge:
        async def __call__(self, sample: object) -> float:
            return 1.0

    assert RewardFunction("partial", functools.partial(mine, 2.0)).is_async
    assert RewardFunction("object", Judge()).is_async
    assert not RewardFunction("plain", lambda sample: 1.0).is_async


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("mine"), "package.module.function"),
        (Source("no_such_module.mine"), "ModuleNotFoundError"),
        (Source("math.no_such_function"), "'no_such_function'"),
        (Source("math.pi"), "float"),
        (Source("no_such_file.py", script=True), "no_such_file.py"),
    ],
)
def test_a_source_that_cannot_be_loaded_says_why(source: Source, message: str) -> None:
    with pytest.raises(RewardLoadError, match=message):
        load([source])


def test_nothing_to_serve_is_an_error(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("")
    with pytest.raises(RewardLoadError, match="@reward"):
        load([Source(str(script), script=True)])


def test_every_built_in_reward_can_be_loaded_under_its_name() -> None:
    assert list(load(sources(list(BUILTIN), None, group_rm=False))) == list(BUILTIN)


def test_the_custom_function_comes_first() -> None:
    assert sources(["math"], "pkg.mine", group_rm=True)[0] == Source("pkg.mine", group=True)


def test_an_unknown_built_in_reward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"maths.*exact_match"):
        sources(["maths"], None, group_rm=False)
