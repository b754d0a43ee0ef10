"""Metrics, samples, activity, checkpoints, workers and logs over REST, and through the client."""

from __future__ import annotations

import asyncio
import io
import pathlib
import tarfile
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from gateway_stack import Stack, fill_run_folder

from miles.client import MilesClient, MilesError
from miles.rpc import WorkerAttachment
from miles.rpc.gen import controller_pb2


@pytest.fixture
def job(waiting_job: dict[str, Any]) -> dict[str, Any]:
    """A job whose run folder holds what a run would have left."""
    fill_run_folder(pathlib.Path(waiting_job["config"]["run_dir"]))
    return waiting_job


def test_metrics_have_range_and_step(http: httpx.Client, job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{job['id']}/metrics"
    found = http.get(path).json()
    assert found["names"] == ["rollout/raw_reward", "train/loss"]
    assert found["newest_step"] == 5
    assert found["series"][0]["values"] == [0.5, None, 0.5, 0.5, 0.5, 0.5]
    part = http.get(path, params={"name": "train/*", "start": 1, "end": 4, "step": 2}).json()
    assert [(s["name"], s["steps"], s["values"]) for s in part["series"]] == [("train/loss", [1, 3], [1.5, 3.5])]
    assert http.get(path, params={"start": 5, "end": 4}).json()["series"] == []
    with MilesClient(str(http.base_url)) as client:
        assert client.metrics(job["id"], ["train/loss"], end=1)["series"][0]["steps"] == [0, 1]
        assert [span["activity"] for span in client.timeline(job["id"])] == ["train"]


def test_samples_have_what_was_sampled_and_how_far_trainer_and_engine_differ(
    http: httpx.Client, job: dict[str, Any]
) -> None:
    with MilesClient(str(http.base_url)) as client:
        everything = list(client.samples(job["id"], page_size=1))
        assert [(s["step"], s["index"]) for s in everything] == [(s, i) for s in (2, 1, 0) for i in (0, 1)]
        assert [s["step"] for s in client.samples(job["id"], step=1, min_reward=1)] == [1]
        assert list(client.samples(job["id"], max_reward=-1)) == []
    assert everything[1] == {
        "step": 2,
        "group_id": 2,
        "index": 1,
        "prompt": [{"role": "user", "content": "häh?"}],
        "response": "ja\n",
        "label": "ja",
        "reward": 1.0,
        "reward_parts": {},
        "status": "completed",
        "response_length": 2,
        "versions": [{"version": 2, "start": 0, "end": 2}],
        "log_prob_diff": {"mean": 1.0, "max": 1.0},
        "advantage": 0.5,
        "cut": False,
    }


def test_an_export_is_downloaded_whole(http: httpx.Client, job: dict[str, Any], tmp_path: pathlib.Path) -> None:
    with MilesClient(str(http.base_url)) as client:
        (checkpoint,) = client.checkpoints(job["id"])
        assert (checkpoint["step"], [f["name"] for f in checkpoint["hf_files"]]) == (
            6,
            ["config.json", "model.safetensors"],
        )
        size = client.download(job["id"], 6, tmp_path / "out.tar")
        with pytest.raises(MilesError, match="steps that have one: 6"):
            client.download(job["id"], 5, tmp_path / "none.tar")
    archive = (tmp_path / "out.tar").read_bytes()
    assert len(archive) == size
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        contents = {pathlib.Path(m.name).name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert contents == {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 8000}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar"]


def test_an_export_of_a_job_with_a_long_name_is_downloaded_whole(
    stack: Stack, http: httpx.Client, submit: Callable[..., dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    job = submit(name="n" * 64)
    fill_run_folder(pathlib.Path(job["config"]["run_dir"]))
    long = "model-00001-of-00030-" + "x" * 60 + ".safetensors"
    pathlib.Path(job["config"]["run_dir"], "hf", "6", long).write_bytes(b"weights")
    with MilesClient(str(http.base_url)) as client:
        client.download(job["id"], 6, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert f"{job['id']}-step6/{long}" in tar.getnames()


def test_logs_are_listed_read_and_free_of_secrets(http: httpx.Client, job: dict[str, Any]) -> None:
    with MilesClient(str(http.base_url)) as client:
        assert [log["name"] for log in client.logs(job["id"])] == ["rollout-0"]
        piece = client.read_log(job["id"], "rollout-0")
        assert piece["text"] == "started\nredis://:[redacted]@host\nlast\n"
        assert client.read_log(job["id"], "rollout-0", offset=piece["next_offset"])["text"] == ""
        with pytest.raises(MilesError) as refused:
            client.read_log(job["id"], "nothing")
        assert refused.value.kind == "not-found"


async def test_workers_come_and_go(stack: Stack) -> None:
    attachment = WorkerAttachment(
        stack.controller.address,
        worker_id="rollout-7",
        kind=controller_pb2.WORKER_KIND_ROLLOUT,
        address="127.0.0.1:1",
        heartbeat=lambda: controller_pb2.WorkerHeartbeat(progress=3, activity="idle", load={"running_requests": 2}),
        info={"api_key": "geheim"},
    )
    attached = asyncio.create_task(attachment.run())

    async def worker(health: str) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=stack.local.address) as client:
            while True:
                workers = (await client.get("/v1/workers")).json()["workers"]
                found = [w for w in workers if w["id"] == "rollout-7" and w["health"] == health and w["progress"]]
                if found:
                    return dict(found[0])
                await asyncio.sleep(0.1)

    found = await asyncio.wait_for(worker("good"), 20)
    assert (found["kind"], found["load"], found["version"]) == ("rollout", {"running_requests": 2.0}, None)
    assert found["info"]["api_key"] == "[redacted]"
    attached.cancel()
    await asyncio.gather(attached, return_exceptions=True)
    assert (await asyncio.wait_for(worker("lost"), 20))["versions"] == []


def test_prometheus_sees_requests_jobs_and_workers(http: httpx.Client, job: dict[str, Any]) -> None:
    text = http.get("/metrics").text
    assert 'miles_gateway_requests_total{method="POST",route="/v1/jobs",status="201"}' in text
    assert "miles_controller_up 1.0" in text
    assert 'miles_jobs{state="queued"}' in text
    assert "miles_gateway_request_seconds_bucket" in text
