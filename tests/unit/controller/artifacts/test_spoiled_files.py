"""What cannot be read in a run folder is left out: a spoiled file must not take the rest with it, nor be waited for."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

from miles.rpc.gen import records_pb2
from miles.services.controller.artifacts.checkpoints import CheckpointFiles
from miles.services.controller.artifacts.log_spans import NAME, LogSpans
from miles.services.controller.artifacts.metrics import MetricLog
from miles.services.controller.artifacts.samples import SampleFilter, list_samples
from miles.services.controller.status import timeline
from miles.services.controller.status.timeline import TimelineWriter
from miles.telemetry import MetricsWriter, read_metrics

SPOILED = [
    b"\x00\xff\xfe\n",
    b"[]\n",
    b"{}\n",
    b'{"step": "x"}\n',
    b'{"step": 1, "a": "text"}\n',
    b'{"step": 1, "a": 1' + b"0" * 400 + b"}\n",
    b'{"step": 1' + b"0" * 30 + b"}\n",
    b"[" * 100_000 + b"\n",
]
MAKE: list[Callable[[pathlib.Path], None]] = [os.mkfifo, os.mkdir]  # type: ignore[list-item]


def names(log: MetricLog) -> dict[str, list[float]]:
    log.refresh()
    answer = log.select(records_pb2.ListMetricsRequest())
    return {series.name: list(series.values) for series in answer.series}


@pytest.mark.parametrize("line", SPOILED, ids=range(len(SPOILED)))
def test_a_spoiled_line_costs_the_metrics_of_that_line_alone(tmp_path: pathlib.Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "a": 1}\n' + line + b'{"step": 2, "a": 3}\n')
    assert names(MetricLog(path)) == {"a": [1.0, 3.0]}
    assert [each["step"] for each in read_metrics(path)] == [0, 2]
    writer = MetricsWriter(path, first_step=1)
    writer.close()
    assert [each["step"] for each in read_metrics(path)] == [0]


@pytest.mark.parametrize("make", MAKE)
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(
    tmp_path: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> None:
    for name in ("metrics.jsonl", timeline.NAME, NAME, "step_00000001.rank0.jsonl"):
        folder = tmp_path / "samples" if name.startswith("step") else tmp_path
        folder.mkdir(exist_ok=True)
        make(folder / name)
    assert names(MetricLog(tmp_path / "metrics.jsonl")) == {}
    with pytest.raises(OSError, match="regular file"):
        MetricsWriter(tmp_path / "metrics.jsonl")
    assert timeline.read_timeline(tmp_path / timeline.NAME, 0.0, 10) == []
    with pytest.raises(OSError, match=rf"{timeline.NAME}"):
        TimelineWriter(tmp_path / timeline.NAME).add("train", 0.0, 1.0)
    assert LogSpans(tmp_path, tmp_path.parent).of("x", 10) == []
    assert list_samples(tmp_path, SampleFilter(), 10, "") == ([], "")


@pytest.mark.parametrize(
    "text", ["", '{"not": "a list"}', "[1]", '[{"begin": {"a": "x"}, "end": null}]', "[" * 100_000]
)
def test_spans_that_a_power_cut_or_another_program_spoiled_begin_anew(tmp_path: pathlib.Path, text: str) -> None:
    logs = tmp_path.parent / f"{tmp_path.name}-logs"
    logs.mkdir()
    (logs / "trainer-0.log").write_text("of another job\n")
    (tmp_path / NAME).write_text(text)
    spans = LogSpans(tmp_path, logs)
    spans.begin()
    (logs / "trainer-0.log").write_text("of another job\nmine\n")
    spans.end()
    assert LogSpans(tmp_path, logs).of("trainer-0", 100) == [(15, 20)]


def test_spoiled_samples_and_activities_are_left_out(tmp_path: pathlib.Path) -> None:
    spans = TimelineWriter(tmp_path / timeline.NAME)
    spans.add("train", 1.0, 2.0)
    spans.close()
    with (tmp_path / timeline.NAME).open("a") as file:
        file.write('\x00\x00\n{"activity": 1}\n')
    assert [span.activity for span in timeline.read_timeline(tmp_path / timeline.NAME, 0.0, 10)] == ["train"]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_00000001.rank0.jsonl").write_text('\x00\n[]\n{"samples": [{}]}\n')
    assert list_samples(tmp_path, SampleFilter(), 10, "") == ([], "")


def test_exports_are_found_by_padded_steps_without_their_owner_file(tmp_path: pathlib.Path) -> None:
    export = tmp_path / "out" / "000012"
    export.mkdir(parents=True)
    for name in ("config.json", ".miles-owner.json"):
        (export / name).write_text("{}")
    settings = {"run_dir": str(tmp_path / "run"), "save_hf": str(tmp_path / "out" / "{rollout_id:06d}")}
    (found,) = CheckpointFiles(settings).find()
    assert found.step == 12
    assert [file.name for file in found.hf_files] == ["config.json"]
