from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miles.extensions.loading import ExtensionError
from miles.services.rollout.engines.base import SamplingParams
from miles.services.rollout.functions.calls import MadeCall
from miles.services.rollout.functions.trajectory import finished_sample
from miles.types import Sample, SampleStatus, VersionSpan
from miles.utils import types as users

LEASED = Sample(group_id=3, index=1, prompt="p", tokens=np.array([1, 2], np.int32))
TRAINED_AS = SamplingParams(max_new_tokens=9)
Status = users.Sample.Status


def returned(tokens: list[int], length: int, **fields: Any) -> users.Sample:
    return users.Sample(tokens=tokens, response_length=length, **{"status": Status.COMPLETED, **fields})


def call(input_ids: list[int], output: list[int], *versions: int, **sampling: Any) -> MadeCall:
    """A request whose tokens are of these versions, one each, or all of the only one."""
    each = versions if len(versions) == len(output) else versions * len(output)
    spans = tuple(VersionSpan(version, i, i + 1) for i, version in enumerate(each))
    log_probs = [-float(token) / 8 for token in output]
    return MadeCall(input_ids, output, log_probs, spans, SamplingParams(max_new_tokens=9, **sampling))


def finished(sample: object, *calls: MadeCall, training: bool = True, version: int = 7) -> Sample:
    return finished_sample(LEASED, sample, calls, trained_as=TRAINED_AS if training else None, version=version)


def test_tokens_get_the_versions_of_their_requests_and_a_tools_those_of_what_came_before() -> None:
    seen = returned([1, 2, 10, 11, 50, 51, 12, 13], 6, loss_mask=[1, 1, 0, 0, 1, 1])
    sample = finished(seen, call([1, 2], [10, 11], 4), call([1, 2, 10, 11, 50, 51], [12, 13], 4, 6))
    assert sample.weight_versions == (VersionSpan(4, 0, 5), VersionSpan(6, 5, 6))
    assert sample.rollout_log_probs is not None
    assert sample.rollout_log_probs.tolist() == [-1.25, -1.375, 0, 0, -1.5, -1.625]
    assert (sample.group_id, sample.index, sample.status) == (3, 1, SampleStatus.COMPLETED)


def test_requests_that_were_made_with_another_text_are_found_by_their_output() -> None:
    seen = returned([1, 2, 10, 11, 50, 12], 4, loss_mask=[1, 1, 0, 1], rollout_log_probs=[-1.0, -2.0, 0.0, -3.0])
    sample = finished(seen, call([9, 9, 9], [10, 11, 99], 4), call([8], [12], 5))
    assert sample.weight_versions == (VersionSpan(4, 0, 3), VersionSpan(5, 3, 4))
    assert sample.rollout_log_probs is not None
    assert sample.rollout_log_probs.tolist() == [-1.0, -2.0, 0.0, -3.0]


def test_tokens_that_no_request_accounts_for_count_as_of_the_oldest_version_and_have_no_log_probs() -> None:
    sample = finished(returned([1, 2, 30, 31], 2), call([1, 2], [10, 11], 4), call([5], [12], 3))
    assert sample.weight_versions == (VersionSpan(3, 0, 2),)
    assert sample.rollout_log_probs is None
    assert finished(returned([1, 2, 30], 1)).weight_versions == (VersionSpan(7, 0, 1),)


def test_versions_never_go_down_along_a_response() -> None:
    sample = finished(returned([1, 2, 12, 10], 2), call([9], [10], 4), call([9], [12], 6))
    assert sample.weight_versions == (VersionSpan(4, 0, 2),)


def test_a_response_that_was_cut_keeps_the_log_probs_of_what_is_left() -> None:
    sample = finished(returned([1, 2, 10], 1), call([1, 2], [10, 11], 4))
    assert sample.rollout_log_probs is not None
    assert sample.rollout_log_probs.tolist() == [-1.25]


def test_tokens_of_another_distribution_are_trained_on_only_behind_a_mask() -> None:
    made = call([1, 2], [10, 11], 4, top_p=0.9)
    with pytest.raises(ExtensionError, match=r"drawn at temperature 1, top_p 0\.9 and top_k -1"):
        finished(returned([1, 2, 10, 11], 2), made)
    assert finished(returned([1, 2, 10, 11], 2, loss_mask=[0, 0]), made).loss_mask is not None
    assert finished(returned([1, 2, 10, 11], 2), made, training=False).response_length == 2


def test_attributes_of_the_functions_own_are_kept_if_they_are_json() -> None:
    seen = returned([1, 2, 10], 1, metadata={"a": 1})
    seen.turns, seen.client = [1, {"x": None}], object()  # type: ignore[attr-defined]
    assert finished(seen).metadata == {"a": 1, "sample_attributes": {"turns": [1, {"x": None}]}}


@pytest.mark.parametrize("status", [Status.ABORTED, Status.FAILED])
def test_a_sample_that_was_given_up_is_failed(status: users.Sample.Status) -> None:
    sample = finished(returned([1, 2, 10], 1, status=status))
    assert (sample.status, sample.remove_sample, sample.response_length) == (SampleStatus.FAILED, True, 0)
    assert sample.metadata["reward_error"] == f"its function returned it as {status.name}"


def test_a_sample_without_a_response_is_failed() -> None:
    assert finished(returned([], 0)).metadata["reward_error"] == "it has no response"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (returned([1, 2, 10], 1, loss_mask=[1, 1]), r"loss_mask has shape \(2,\), but response_length is 1"),
        (returned([1, 2, 10], 1, loss_mask=[2]), "loss_mask has another value than 0 and 1"),
        (returned([1, 2, 10], 1, rollout_log_probs=[]), r"rollout_log_probs has shape \(0,\)"),
        (returned([1, 2, 10], 1, rollout_log_probs=[float("nan")]), "rollout_log_probs has a value that is not finite"),
        (returned([1, 2, 10], 3), "response_length is 3 of 3 tokens"),
        (returned(["a"], 0), "tokens is no list of numbers"),  # type: ignore[list-item]
        ({"tokens": []}, "it returned a builtins.dict; return the Sample"),
        ([users.Sample(), users.Sample()], "it returned 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused(sample: object, words: str) -> None:
    with pytest.raises(ExtensionError, match=words):
        finished(sample)
