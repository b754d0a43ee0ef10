"""Jobs over REST on real services: one after another, watched, paused, resumed, downloaded."""

from __future__ import annotations

import pathlib
import tarfile
from collections.abc import Iterator

import pytest
from serving_cluster import config, serving, wait_for

from miles.client import MilesClient


@pytest.fixture(scope="module")
def client(tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilesClient]:
    """A client of `miles serve`, which all tests here share."""
    with serving(tmp_path_factory.mktemp("serve"), tiny_dense) as client:
        yield client


def test_jobs_run_one_after_another_and_leave_their_records(
    client: MilesClient, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first = client.submit(config(tiny_dense, name="first"))["id"]
    second = client.submit(config(tiny_dense, name="second", num_rollout=2))["id"]
    events = list(client.watch(first))
    assert [event["state"] for event in events if event["type"] == "state"] == ["starting", "running", "succeeded"]
    assert [e["step"] for e in events if e["type"] == "metrics" and "perf/step_time" in e["values"]] == [0, 1, 2]
    assert list(client.watch(second))[-1]["state"] == "succeeded"
    jobs = {job["id"]: job for job in client.jobs()}
    assert (jobs[first]["policy_version"], jobs[second]["policy_version"]) == (3, 2)
    assert jobs[first]["ended_at"] <= jobs[second]["started_at"]

    (series,) = client.metrics(first, ["rollout/raw_reward"])["series"]
    assert series["steps"] == [0, 1, 2]
    samples = list(client.samples(first, step=1))
    assert len(samples) == 16
    assert {span["version"] for sample in samples for span in sample["versions"]} == {1}
    assert all(sample["log_prob_diff"]["max"] < 0.5 for sample in samples)
    spans = client.timeline(first)
    assert {span["activity"] for span in spans if span["worker"] is None} == {"generate", "train", "sync"}
    assert {(span["worker"], span["activity"]) for span in spans if span["worker"]} >= {
        ("rollout-0", "generate"),
        ("reward-0", "score"),
        ("trainer-0", "train"),
        ("trainer-0", "export"),
        ("weightsync", "activate"),
    }
    tokens = client.sample(first, 1, samples[0]["group_id"], samples[0]["index"])["tokens"]
    assert "".join(tokens["texts"]).removesuffix("<end>") == samples[0]["response"]
    assert len(tokens["train_log_probs"]) == len(tokens["rollout_log_probs"]) == samples[0]["response_length"]
    assert {log["name"] for log in client.logs(first)} >= {"controller", "rollout-0", "trainer-0"}
    logs = {job_id: client.read_log(job_id, "controller")["text"] for job_id in (first, second)}
    assert "version 3 is active" in logs[first]
    assert "version 3 is active" not in logs[second]
    assert second not in logs[first]

    (checkpoint,) = [each for each in client.checkpoints(first) if each["hf_files"]]
    client.download(first, checkpoint["step"], tmp_path / "export.tar")
    with tarfile.open(tmp_path / "export.tar") as archive:
        names = {pathlib.Path(name).name for name in archive.getnames()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_job_is_paused_stopped_and_taken_up_again(client: MilesClient, tiny_dense: pathlib.Path) -> None:
    job_id = client.submit(config(tiny_dense, name="long", num_rollout=200))["id"]
    wait_for(client, job_id, lambda job: job["policy_version"] >= 2)
    client.pause(job_id)
    paused = wait_for(client, job_id, lambda job: job["state"] == "paused")
    versions = {worker["kind"]: worker["version"] for worker in client.workers(job_id)}
    assert versions["rollout"] == versions["trainer"] == paused["policy_version"]
    wait_for(client, job_id, lambda _: not client.status(job_id)["running"])
    status = client.status(job_id)
    assert (status["phase"], status["waiting_for"]) == ("paused", "the user to resume the job")
    waits = {worker["worker"]: worker["waiting_for"] for worker in status["workers"]}
    assert (waits["trainer-0"], waits["rollout-0"]) == ("the user to resume the job", "paused by the user")
    client.checkpoint(job_id)
    saved = wait_for(client, job_id, lambda job: "checkpoint" in job["summary"])
    assert saved["state"] == "paused"
    assert [each["step"] for each in client.checkpoints(job_id)] == [paused["policy_version"]]
    client.resume(job_id)
    wait_for(client, job_id, lambda job: job["policy_version"] > paused["policy_version"])
    client.stop(job_id)
    stopped = wait_for(client, job_id, lambda job: job["state"] == "stopped")
    client.resume(job_id)
    wait_for(client, job_id, lambda job: job["policy_version"] > stopped["policy_version"])
    client.cancel(job_id)
    wait_for(client, job_id, lambda job: job["state"] == "cancelled")
    assert client.status(job_id)["phase"] == "ended"
