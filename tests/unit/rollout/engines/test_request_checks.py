from __future__ import annotations

import pytest

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.request_checks import Check, check_request


def check(request: GenerationRequest, running: bool = False, further: tuple[Check, ...] = ()) -> None:
    check_request(request, vocabulary=100, max_total_tokens=20, running=running, further=further)


def test_a_request_up_to_every_limit_is_accepted() -> None:
    sampling = SamplingParams(max_new_tokens=17, temperature=0.0, top_p=1.0, top_k=1, min_new_tokens=17)
    check(GenerationRequest("r", [0, 1, 99, 5], sampling, resumed_tokens=1), further=((True, "not raised"),))


@pytest.mark.parametrize(
    ("ids", "resumed", "sampling", "fault"),
    [
        ([1], 1, {}, "1 input tokens, 1 of them resumed: no prompt"),
        ([1], -1, {}, "resumed_tokens is -1"),
        ([1, 100], 0, {}, r"token \[100\] is not in the vocabulary of 100"),
        ([1] * 17, 0, {}, "prompt of 17 tokens and max_new_tokens 4 exceed the engine's limit of 20"),
        ([1], 0, {"temperature": -0.1}, "temperature is -0.1"),
        ([1], 0, {"top_p": 0.0}, "top_p is 0.0"),
        ([1], 0, {"top_k": 0}, "top_k is 0"),
        ([1], 0, {"min_new_tokens": 5}, "min_new_tokens is 5"),
        ([1], 0, {"stop": ("a", "")}, "stop holds an empty string"),
    ],
)
def test_each_fault_is_named(ids: list[int], resumed: int, sampling: dict[str, float], fault: str) -> None:
    params = SamplingParams(**{"max_new_tokens": 4, **sampling})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^request r: {fault}"):
        check(GenerationRequest("r", ids, params, resumed_tokens=resumed))


def test_all_faults_are_listed_with_the_engines_own_last() -> None:
    request = GenerationRequest("r", [1], SamplingParams(max_new_tokens=4, top_p=2.0))
    with pytest.raises(ValueError, match=r"^request r: a request with this id is running; top_p is 2\.0.*; its own$"):
        check(request, running=True, further=((True, "holds"), (False, "its own")))
