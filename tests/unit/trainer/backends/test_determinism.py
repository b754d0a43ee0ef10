from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from miles.services.trainer.backends.determinism import choose_determinism

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards, whatever the test does
        monkeypatch.delenv(name)
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def test_a_cpu_is_always_deterministic() -> None:
    choose_determinism(CPU, asked=False)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not set(VARIABLES) & set(os.environ)


def test_a_gpu_is_when_asked_and_warns_of_what_is_not() -> None:
    choose_determinism(CUDA, asked=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert [os.environ[name] for name in VARIABLES] == [":4096:8", "0"]
    choose_determinism(CUDA, asked=False)  # the next job's
    assert not torch.are_deterministic_algorithms_enabled()


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_determinism(CUDA, asked=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
