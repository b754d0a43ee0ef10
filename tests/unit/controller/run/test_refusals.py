"""When a job has no rollout left whose engine could take its weights."""

from __future__ import annotations

import pytest

from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WeightsRefusedError, WorkerFailedError
from miles.services.controller.run.refusals import Refusals


def test_the_only_engine_that_refuses_ends_the_job_with_its_words() -> None:
    with pytest.raises(WeightsRefusedError, match=r"rollout-0: lm_head\.weight is missing") as error:
        Refusals().check({"rollout-0": "lm_head.weight is missing"}, 0.0)
    assert isinstance(error.value, WorkerFailedError), "it must not be taken for a lost worker, which is waited for"


@pytest.mark.parametrize("refusals", [{}, {"a": ""}, {"a": "b is missing", "c": ""}])
def test_a_job_goes_on_while_another_worker_may_serve(refusals: dict[str, str]) -> None:
    Refusals().check(refusals, 0.0)


def test_a_lost_worker_is_waited_for_as_long_as_one_may_take_to_attach() -> None:
    refusals = Refusals()
    refusals.lost("b", 100.0)
    refusals.check({"a": "c is missing"}, 100.0 + deadlines.WORKERS_ATTACH_S - 1)
    with pytest.raises(WeightsRefusedError):
        refusals.check({"a": "c is missing"}, 100.0 + deadlines.WORKERS_ATTACH_S)


def test_a_worker_that_came_back_and_refuses_is_not_waited_for() -> None:
    refusals = Refusals()
    refusals.lost("a", 100.0)
    with pytest.raises(WeightsRefusedError):
        refusals.check({"a": "c is missing"}, 101.0)
