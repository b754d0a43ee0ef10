"""What runs leave on disk, read back: metrics, samples, activity, checkpoints, logs."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from miles.rpc.gen import records_pb2
from miles.services.controller.artifacts import logs as log_files
from miles.services.controller.artifacts import samples as sample_files
from miles.services.controller.artifacts.checkpoints import CheckpointFiles, UnknownFileError
from miles.services.controller.artifacts.log_spans import LogSpans
from miles.services.controller.artifacts.metrics import MetricLog
from miles.services.controller.artifacts.token_texts import token_texts
from miles.services.controller.status import timeline
from miles.services.controller.status.worker_activity import Activity, WorkerActivities
from miles.services.trainer.step.sample_log import MAX_TEXT_CHARS, MAX_TOKENS, SampleLog, TokenMetrics
from miles.telemetry import MetricsWriter
from miles.types import Sample, SampleStatus, VersionSpan


def select(log: MetricLog, *names: str, first: int = 0, last: int | None = None, stride: int = 1) -> dict[str, list]:  # type: ignore[type-arg]
    request = records_pb2.ListMetricsRequest(names=names, first_step=first, stride=stride)
    if last is not None:
        request.last_step = last
    log.refresh()
    return {series.name: list(zip(series.steps, series.values, strict=True)) for series in log.select(request).series}


def test_metrics_are_read_as_they_are_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    assert select(log) == {}
    writer = MetricsWriter(path)
    writer.write(0, {"train/loss": 1.0, "eval/a": 0.5})
    assert select(log) == {"eval/a": [(0, 0.5)], "train/loss": [(0, 1.0)]}
    writer.write(1, {"train/loss": 2.0})
    writer.write(1, {"eval/a": 0.75})
    with path.open("a") as file:
        file.write('{"step": 2, "train/lo')  # a line in the making
    assert select(log, "train/*") == {"train/loss": [(0, 1.0), (1, 2.0)]}
    assert select(log, "eval/a", first=1) == {"eval/a": [(1, 0.75)]}
    assert select(log, last=0) == {"eval/a": [(0, 0.5)], "train/loss": [(0, 1.0)]}


def test_a_resumed_run_takes_its_later_steps_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    writer = MetricsWriter(path)
    for step in range(4):
        writer.write(step, {"a": step})
    assert len(select(log)["a"]) == 4
    writer.close()
    again = MetricsWriter(path, first_step=2)
    again.write(2, {"a": 20})
    assert select(log) == {"a": [(0, 0), (1, 1), (2, 20)]}


def test_a_stride_gives_the_mean_of_each_stretch(tmp_path: pathlib.Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    for step, value in enumerate([1.0, 3.0, math.nan, 7.0, math.inf, math.nan]):
        writer.write(step, {"a": value})
    values = select(MetricLog(tmp_path / "m.jsonl"), first=0, stride=2)["a"]
    assert values[:2] == [(0, 2.0), (2, 7.0)]
    assert values[2][0] == 4
    assert math.isnan(values[2][1])


def sample(group_id: int, index: int, reward: float | None, **changes: object) -> Sample:
    fields = {
        "group_id": group_id,
        "index": index,
        "prompt": f"prompt {group_id}",
        "tokens": np.arange(5, dtype=np.int32),
        "response_length": 3,
        "response": f"response {index}",
        "label": "x",
        "reward": reward,
        "status": SampleStatus.COMPLETED if reward is not None else SampleStatus.FAILED,
        "weight_versions": (VersionSpan(4, 0, 3),),
    }
    return Sample(**{**fields, **changes})  # type: ignore[arg-type]


def numbers(shift: float) -> TokenMetrics:
    log_probs = np.array([-1.0, -2.0, -3.0], np.float32)
    return TokenMetrics(
        mask=np.array([1, 1, 0], np.float32),
        advantages=np.array([0.5, 0.5, 9.0], np.float32),
        train_log_probs=log_probs,
        rollout_log_probs=log_probs + np.array([shift, -3 * shift, 50.0], np.float32),
    )


def write_steps(run_dir: pathlib.Path, steps: int, groups: int = 2) -> None:
    """Two ranks record `steps` steps; each has one sample of every group."""
    for rank in range(2):
        log = SampleLog(run_dir, groups, rank, None)
        for step in range(steps):
            samples = [(sample(10 * step + g, rank, float(rank)), numbers(0.25)) for g in range(groups)]
            log.write(step, samples)


def test_samples_of_all_ranks_are_merged_and_paged(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, steps=3)
    found, token = [], ""
    while True:
        page, token = sample_files.list_samples(tmp_path, sample_files.SampleFilter(), 5, token)
        found += [(s.step, s.group_id, s.index) for s in page]
        if not token:
            break
    assert found == [(step, 10 * step + g, i) for step in (2, 1, 0) for g in (0, 1) for i in (0, 1)]


def test_a_page_of_long_samples_ends_before_it_is_too_large_for_a_message(tmp_path: pathlib.Path) -> None:
    long = "語" * 40_000
    log = SampleLog(tmp_path, 1, 0, None)
    samples = [dataclasses.replace(sample(0, i, 1.0), prompt=long, response=long) for i in range(100)]
    log.write(0, [(each, None) for each in samples])
    found, token, pages = [], "", 0
    while pages == 0 or token:
        page, token = sample_files.list_samples(tmp_path, sample_files.SampleFilter(), 1000, token)
        assert page
        assert sum(each.ByteSize() for each in page) <= sample_files.PAGE_BYTES
        found += [each.index for each in page]
        pages += 1
    assert found == list(range(100))
    assert pages > 1


def test_samples_say_what_the_trainer_knew(tmp_path: pathlib.Path) -> None:
    log = SampleLog(tmp_path, 1, 0, "math")
    unscored = sample(1, 1, None)
    parts = dataclasses.replace(sample(1, 0, 1.0), reward={"math": 1.0, "style": 0.5}, status=SampleStatus.TRUNCATED)
    log.write(7, [(unscored, None), (parts, numbers(0.25))])
    (first, second), _ = sample_files.list_samples(tmp_path, sample_files.SampleFilter(step=7), 5, "")
    assert (first.reward, dict(first.reward_parts)) == (1.0, {"math": 1.0, "style": 0.5})
    assert (first.log_prob_diff_mean, first.log_prob_diff_max, first.advantage) == (0.5, 0.75, 0.5)
    assert json.loads(first.prompt_json) == "prompt 1"
    assert [(s.version, s.start, s.end) for s in first.weight_versions] == [(4, 0, 3)]
    assert not second.HasField("reward")
    assert not second.HasField("log_prob_diff_mean")


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (sample_files.SampleFilter(min_reward=1), {1}),
        (sample_files.SampleFilter(max_reward=0), {0}),
        (sample_files.SampleFilter(step=1), {0, 1}),
        (sample_files.SampleFilter(step=9), set()),
    ],
)
def test_samples_are_filtered(tmp_path: pathlib.Path, wanted: sample_files.SampleFilter, indices: set[int]) -> None:
    write_steps(tmp_path, steps=3)
    page, _ = sample_files.list_samples(tmp_path, wanted, 100, "")
    assert {s.index for s in page} == indices
    assert wanted.step is None or {s.step for s in page} <= {wanted.step}


def test_a_filter_that_nothing_passes_reads_a_bounded_number_of_steps_a_page(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, steps=sample_files.MAX_STEPS_A_PAGE + 5, groups=1)
    wanted = sample_files.SampleFilter(min_reward=99)
    page, token = sample_files.list_samples(tmp_path, wanted, 10, "")
    assert (page, token) == ([], "4..-1")
    assert sample_files.list_samples(tmp_path, wanted, 10, token) == ([], "")
    everything = sample_files.SampleFilter()
    assert {s.step for s in sample_files.list_samples(tmp_path, everything, 99, token)[0]} == set(range(5))


@pytest.mark.parametrize("token", ["x", "1", "1.2", "-1.0.0", "1.2.3.4", "9" * 30 + ".0.0"])
def test_a_page_token_that_no_page_ended_with_is_refused(tmp_path: pathlib.Path, token: str) -> None:
    with pytest.raises(sample_files.BadPageToken):
        sample_files.list_samples(tmp_path, sample_files.SampleFilter(), 10, token)


def test_a_resumed_run_drops_samples_of_steps_to_be_taken_again(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, steps=3)
    SampleLog(tmp_path, 2, 0, None).discard_from(1)
    page, _ = sample_files.list_samples(tmp_path, sample_files.SampleFilter(), 99, "")
    assert {s.step for s in page} == {0}


def test_a_sample_is_found_with_the_numbers_of_its_tokens(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, steps=2)
    found, tokens = sample_files.find_sample(tmp_path, (1, 11, 1))
    assert (found.step, found.group_id, found.index) == (1, 11, 1)
    assert tokens == {
        "group_id": 11,
        "index": 1,
        "ids": [2, 3, 4],
        "mask": [1, 1, 0],
        "advantages": [0.5, 0.5, 9.0],
        "train": [-1.0, -2.0, -3.0],
        "rollout": [-0.75, -2.75, 47.0],
        "skipped": 0,
        "skipped_at": 0,
    }
    for place in ((1, 11, 2), (1, 12, 0), (2, 11, 1)):
        with pytest.raises(sample_files.UnknownSampleError):
            sample_files.find_sample(tmp_path, place)


def test_of_a_sample_that_was_not_trained_on_only_the_engines_numbers_are_known(tmp_path: pathlib.Path) -> None:
    log_probs = np.array([-1, math.nan, -2], np.float32)
    SampleLog(tmp_path, 1, 0, None).write(0, [(sample(0, 0, None, rollout_log_probs=log_probs), None)])
    _, tokens = sample_files.find_sample(tmp_path, (0, 0, 0))
    assert tokens is not None
    assert (tokens["train"], tokens["advantages"], tokens["mask"]) == ([], [], [])
    assert tokens["rollout"] == [-1.0, None, -2.0]


def test_the_middle_of_a_long_response_is_left_out_of_its_tokens(tmp_path: pathlib.Path) -> None:
    length = MAX_TOKENS + 10
    long = sample(0, 0, 1.0, tokens=np.arange(length + 2, dtype=np.int32), response_length=length)
    SampleLog(tmp_path, 1, 0, None).write(0, [(long, None)])
    _, tokens = sample_files.find_sample(tmp_path, (0, 0, 0))
    assert tokens is not None
    assert (tokens["skipped"], tokens["skipped_at"], len(tokens["ids"])) == (10, MAX_TOKENS // 2, MAX_TOKENS)
    assert (tokens["ids"][0], tokens["ids"][MAX_TOKENS // 2 - 1]) == (2, MAX_TOKENS // 2 + 1)
    assert (tokens["ids"][MAX_TOKENS // 2], tokens["ids"][-1]) == (MAX_TOKENS // 2 + 12, length + 1)


def test_texts_of_tokens_put_together_are_the_response() -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")

    text = " häh 🎉x"
    texts = token_texts(list(text.encode()), decode)
    assert "".join(texts) == text.removeprefix(" ")
    assert len(texts) == len(text.encode())
    assert texts[-5:] == ["", "", "", "🎉", "x"]
    assert "".join(token_texts([0xF0, 0x9F, 65], decode)) == decode([0xF0, 0x9F, 65])


def test_long_texts_are_cut(tmp_path: pathlib.Path) -> None:
    text = "a" * MAX_TEXT_CHARS + "b"
    SampleLog(tmp_path, 1, 0, None).write(0, [(sample(0, 0, 1.0, response=text), None)])
    (found,), _ = sample_files.list_samples(tmp_path, sample_files.SampleFilter(), 9, "")
    assert found.cut
    assert len(found.response) < MAX_TEXT_CHARS + 100
    assert found.response.endswith("b")


def test_activity_is_read_back_newest_first_to_go(tmp_path: pathlib.Path) -> None:
    path = tmp_path / timeline.NAME
    writer = timeline.TimelineWriter(path)
    for i in range(5):
        writer.step = i
        writer.add("train", i, i + 0.5)
    writer.close()
    spans = timeline.read_timeline(path, 0, 3)
    assert [span.step for span in spans] == [2, 3, 4]
    assert spans[0].end_unix_s - spans[0].start_unix_s == pytest.approx(0.5, abs=2e-3)
    assert [span.step for span in timeline.read_timeline(path, spans[1].end_unix_s, 9)] == [4]
    assert timeline.read_timeline(tmp_path / "none", 0, 9) == []


def test_activity_of_workers_is_told_from_that_of_the_run(tmp_path: pathlib.Path) -> None:
    now = 100.0
    writer = timeline.TimelineWriter(tmp_path / timeline.NAME)
    workers = WorkerActivities(writer.add, lambda: now)
    workers.begin("rollout-0", "generate")
    now = 101.0
    workers.note("reward-0", "score", 0.5)
    now = 101.3
    workers.note("reward-0", "score", 0.4)
    now = 103.0
    workers.end("rollout-0")
    workers.end("rollout-0")
    writer.add("generate", 100.0, 103.0)
    assert workers.current("rollout-0") == Activity("", 103.0)
    now = 110.0
    with workers.during("trainer-0", "train"):
        assert workers.current("trainer-0") == Activity("train", 110.0)
        now = 111.0
    workers.note("reward-0", "score", 0.25)
    workers.close()
    writer.close()
    spans = timeline.read_timeline(tmp_path / timeline.NAME, 0, 99)
    assert [(s.worker_id, s.activity, round(s.end_unix_s - s.start_unix_s, 2)) for s in spans] == [
        ("rollout-0", "generate", 3.0),
        ("", "generate", 3.0),
        ("trainer-0", "train", 1.0),
        ("reward-0", "score", 0.8),
        ("reward-0", "score", 0.25),
    ]


def test_checkpoints_are_found_when_they_are_complete(tmp_path: pathlib.Path) -> None:
    for step, complete in ((2, True), (4, True), (6, False)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * 10)
        if complete:
            (folder / "trainer.json").write_text("{}")
    export = tmp_path / "hf" / "4"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (export / "model.safetensors").write_bytes(b"y" * (1 << 20) + b"z")
    (tmp_path / "hf" / "5.tmp").mkdir()
    files = CheckpointFiles({"run_dir": str(tmp_path)})
    found = files.find()
    assert [(c.step, c.state_bytes, [f.name for f in c.hf_files]) for c in found] == [
        (4, 12, ["config.json", "model.safetensors"]),
        (2, 12, []),
    ]
    assert b"".join(files.open_export(4, "model.safetensors", 1 << 20)) == b"z"
    for step, name in ((4, "../../secret"), (4, "nothing"), (2, "config.json"), (9, "config.json")):
        with pytest.raises(UnknownFileError):
            files.open_export(step, name, 0)


def test_exports_are_found_where_save_hf_says(tmp_path: pathlib.Path) -> None:
    for step in (1, 12):
        folder = tmp_path / "out[a]" / f"v{step}-model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    settings = {"run_dir": str(tmp_path), "save_hf": str(tmp_path / "out[a]" / "v{rollout_id}-model")}
    assert [c.step for c in CheckpointFiles(settings).find()] == [12, 1]
    assert CheckpointFiles({"run_dir": str(tmp_path), "save_hf": str(tmp_path / "fixed")}).find() == []


def test_a_log_is_read_from_its_end_and_followed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rollout-0.log"
    path.write_text("first\nsecond\npassword=geheim123\n")
    whole = log_files.read_log(tmp_path, LogSpans(tmp_path, tmp_path), "rollout-0", None, 0)
    assert whole.text == "first\nsecond\npassword=[redacted]\n"
    tail = log_files.read_log(tmp_path, LogSpans(tmp_path, tmp_path), "rollout-0", None, 25)
    assert tail.text == "password=[redacted]\n"
    with path.open("a") as file:
        file.write("third\nhalf a li")
    more = log_files.read_log(tmp_path, LogSpans(tmp_path, tmp_path), "rollout-0", whole.next_offset_bytes, 0)
    assert more.text == "third\n"
    assert more.size_bytes == path.stat().st_size
    with path.open("a") as file:
        file.write("ne\n")
    assert (
        log_files.read_log(tmp_path, LogSpans(tmp_path, tmp_path), "rollout-0", more.next_offset_bytes, 0).text
        == "half a line\n"
    )


def test_a_line_longer_than_the_limit_comes_in_pieces(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.log").write_text("x" * 100 + "\n")
    piece = log_files.read_log(tmp_path, LogSpans(tmp_path, tmp_path), "a", 0, 40)
    assert (piece.text, piece.next_offset_bytes) == ("x" * 40, 40)


@pytest.mark.parametrize("name", ["../a", "a.log", "nothing", ""])
def test_only_logs_of_the_folder_can_be_read(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "a.log").write_text("secret\n")
    with pytest.raises(log_files.UnknownLogError):
        log_files.read_log(tmp_path / "logs", LogSpans(tmp_path, tmp_path), name, None, 0)


def test_links_are_not_followed(tmp_path: pathlib.Path) -> None:
    outside, run_dir = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (outside / "secret.log").write_text("geheim\n")
    (run_dir / "hf").mkdir(parents=True)
    (run_dir / "hf" / "3").symlink_to(outside)
    assert CheckpointFiles({"run_dir": str(run_dir)}).find() == []
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rollout-0.log").symlink_to(outside / "secret.log")
    spans = LogSpans(run_dir, run_dir / "logs")
    assert log_files.list_logs(run_dir / "logs", spans) == []
    with pytest.raises(log_files.UnknownLogError):
        log_files.read_log(run_dir / "logs", spans, "rollout-0", None, 0)


def test_a_log_is_cut_to_the_times_when_the_job_ran(tmp_path: pathlib.Path) -> None:
    logs, run_dir = tmp_path / "logs", tmp_path / "run"
    logs.mkdir()

    def write(text: str, name: str = "a") -> None:
        with (logs / f"{name}.log").open("a") as file:
            file.write(text)

    def read(offset: int | None = None, limit: int = 0) -> tuple[str, int, int]:
        piece = log_files.read_log(logs, LogSpans(run_dir, logs), "a", offset, limit)
        return piece.text, piece.next_offset_bytes, piece.size_bytes

    write("of another job\n")
    spans = LogSpans(run_dir, logs)
    assert read() == ("", 0, 0)
    assert log_files.list_logs(logs, spans) == []
    spans.begin()
    write("one\ntwo\n")
    spans.begin()  # the controller was started again
    write("a new worker\n", "b")
    assert read() == ("one\ntwo\n", 8, 8)
    spans.end()
    write("of another job\n")
    assert read() == ("one\ntwo\n", 8, 8)
    spans.begin()
    write("three\n")
    assert read() == ("one\ntwo\nthree\n", 14, 14)
    assert read(limit=8) == ("three\n", 14, 14)
    assert read(offset=4) == ("two\nthree\n", 14, 14)
    assert read(offset=8, limit=5) == ("three", 13, 14)
    assert [(log.name, log.size_bytes) for log in log_files.list_logs(logs, spans)] == [("a", 14), ("b", 13)]


def test_the_log_of_the_gateway_is_of_no_job_unless_it_is_the_runs_own(tmp_path: pathlib.Path) -> None:
    logs, run_dir = tmp_path / "logs", tmp_path / "run"
    logs.mkdir()
    spans = LogSpans(run_dir, logs)
    spans.begin()
    for name in ("gateway", "rollout-0"):
        (logs / f"{name}.log").write_text("POST /v1/jobs/other-1f0c2a9b/cancel\n")
    assert [log.name for log in log_files.list_logs(logs, spans)] == ["rollout-0"]
    assert log_files.read_log(logs, spans, "gateway", 0, 0).text == ""
    own = LogSpans(tmp_path, logs)
    assert [log.name for log in log_files.list_logs(logs, own)] == ["gateway", "rollout-0"]
