"""A command that is given again: the job goes on, with the new settings, or the difference is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.launcher.job_words import end_words, resumption
from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.jobs.resubmission import go_on_with, may_go_on

SETTINGS: dict[str, Any] = {"num_rollout": 2, "num_epoch": None, "prompt_data": "a.jsonl", "lr": 1e-6}


def job(state: str, step: int = 2, **settings: Any) -> job_pb2.Job:
    return job_pb2.Job(
        job_id="j",
        state=job_pb2.JobState.Value(f"JOB_STATE_{state}"),
        config_json=json.dumps({**SETTINGS, **settings}),
        policy_version=step,
        error="before",
        ended_unix_ns=7,
    )


@pytest.mark.parametrize("state", ["STOPPED", "FAILED", "CANCELLED"])
def test_a_job_that_ended_early_goes_on_with_the_settings_given(state: str) -> None:
    record = job(state)
    assert may_go_on(record, SETTINGS, None)
    event = go_on_with(record, {**SETTINGS, "lr": 1e-5})
    assert (record.state, record.error, record.ended_unix_ns) == (job_pb2.JOB_STATE_QUEUED, "", 0)
    assert json.loads(record.config_json)["lr"] == 1e-5
    assert record.num_rollout == 2
    assert event is not None
    assert event.state_changed.reason.endswith("goes on from its newest checkpoint with lr 1e-06 → 1e-05")


def test_a_job_that_took_every_step_goes_on_when_more_are_asked_for() -> None:
    assert may_go_on(job("SUCCEEDED"), {**SETTINGS, "num_rollout": 3}, None)
    for less in ({}, {"lr": 1e-5}, {"num_rollout": 1}):
        assert not may_go_on(job("SUCCEEDED"), {**SETTINGS, **less}, None)


def test_only_more_passes_ask_for_more_steps() -> None:
    epochs = {**SETTINGS, "num_rollout": None, "num_epoch": 2}
    record = job("SUCCEEDED", num_rollout=None, num_epoch=2)
    assert may_go_on(record, {**epochs, "num_epoch": 3}, None)
    for other in ({}, {"num_epoch": 1}, {"prompt_data": "b.jsonl"}):
        assert not may_go_on(record, {**epochs, **other}, None)


def test_an_interrupted_job_takes_the_settings_unless_it_runs_already() -> None:
    record = job("RUNNING")
    assert not may_go_on(record, SETTINGS, "j")
    assert may_go_on(record, SETTINGS, "another")
    assert go_on_with(record, {**SETTINGS, "lr": 1e-5}) is None
    assert record.state == job_pb2.JOB_STATE_RUNNING
    assert json.loads(record.config_json)["lr"] == 1e-5


def answer(state: str, *changes: str, resumed: bool = False, created: bool = False) -> str | None:
    return resumption(
        controller_pb2.SubmitJobResponse(job=job(state), created=created, changes=changes, resumed=resumed)
    )


def test_the_launcher_says_which_settings_apply() -> None:
    assert answer("QUEUED", created=True) is None
    assert str(answer("QUEUED", "lr 1 → 2", resumed=True)).endswith("with other settings: lr 1 → 2")
    assert "not applied: lr 1 → 2" in str(answer("RUNNING", "lr 1 → 2"))
    assert "to its end" in str(answer("SUCCEEDED", "lr 1 → 2"))


def test_a_cancelled_job_says_how_to_go_on() -> None:
    assert "the same command goes on" in end_words(job("CANCELLED"))
    assert end_words(job("FAILED")) == "the job has failed: before"
