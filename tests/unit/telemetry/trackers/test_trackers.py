"""Trackers with their real packages, and stores on this machine."""

from __future__ import annotations

import json
import pathlib
import time

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.telemetry.trackers.choice import open_trackers
from miles.telemetry.trackers.mlflow import JOB_TAG, local_store
from miles.telemetry.trackers.tensorboard import TensorBoardTracker

JOB = "0123456789abcdef"


def write_run(folder: pathlib.Path, losses: list[float], first: int = 0, **settings: object) -> list[str]:
    """Write a run of some steps to the trackers that are set; returns the warnings."""
    warnings: list[str] = []
    config = JobConfig.from_flat(MINIMAL | {"name": "sums"} | settings).resolve("cpu")
    [tracker] = open_trackers(config, JOB, folder, warnings.append)
    for step, loss in enumerate(losses, start=first):
        tracker.write(step, {"train/loss": loss, "rollout/raw_reward": 1.0})
    tracker.close()
    return warnings


def test_tensorboard_gets_every_number(tmp_path: pathlib.Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "tb")
    tracker.write(0, 0.0, {"train/loss": 0.5})
    tracker.write(1, 0.0, {"train/loss": 0.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tensors = events.Tensors("train/loss")
    assert [event.step for event in tensors] == [0, 1]
    assert [event.tensor_proto.float_val[0] for event in tensors] == [0.5, 0.25]


def wandb_records(file: pathlib.Path) -> tuple[dict[str, str], list[dict[str, float]]]:
    """The run and the history of an offline run's file."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    run, history = {}, []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = {name: getattr(record.run, name) for name in ("run_id", "project", "run_group", "display_name")}
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            run |= {name: str(config[name]) for name in ("lr", "wandb_key") if name in config}
        if record.HasField("history"):
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            history.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return run, history


def test_weights_and_biases_gets_every_number_offline(tmp_path: pathlib.Path) -> None:
    settings = {"use_wandb": True, "wandb_mode": "offline", "wandb_project": "p", "wandb_group": "g"}
    settings |= {"wandb_key": "k" * 40, "lr": 3e-6}
    assert write_run(tmp_path, [0.5, 0.25], **settings) == []
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run, history = wandb_records(file)
    deadline = time.monotonic() + 60
    while len(history) < 2 and time.monotonic() < deadline:  # its own process writes, in its own time
        time.sleep(0.1)
        run, history = wandb_records(file)
    assert run == {
        "run_id": JOB, "project": "p", "run_group": "g_01234567", "display_name": "g_01234567", "lr": "3e-06",
        "wandb_key": "[redacted]",
    }  # fmt: skip
    assert [(line["step"], line["train/loss"]) for line in history] == [(0, 0.5), (1, 0.25)]
    assert b"k" * 40 not in file.read_bytes()


def test_a_resumed_job_continues_its_mlflow_run(tmp_path: pathlib.Path) -> None:
    from mlflow import MlflowClient

    settings = {"use_mlflow": True, "mlflow_experiment_name": "sorting", "lr": 3e-6}
    assert write_run(tmp_path, [0.5, 0.25], **settings) == []
    assert write_run(tmp_path, [0.125], first=2, **settings) == []
    client = MlflowClient(tracking_uri=local_store(tmp_path))
    experiment = client.get_experiment_by_name("sorting")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags[JOB_TAG]) == ("sums", "FINISHED", JOB)
    assert run.data.params["lr"] == "3e-06"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in losses] == [(0, 0.5), (1, 0.25), (2, 0.125)]


def test_a_server_that_is_not_there_is_a_warning(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    [warning] = write_run(tmp_path, [0.5], use_mlflow=True, mlflow_tracking_uri="http://127.0.0.1:9")
    assert warning.startswith("MLflow cannot be opened: ")
    assert warning.endswith("; metrics.jsonl has all metrics")
