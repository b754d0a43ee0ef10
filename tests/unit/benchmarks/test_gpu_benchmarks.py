"""What the benchmarks against TRL and of asynchrony compute without a GPU: rewards, prompts, settings and tables."""

from __future__ import annotations

import argparse
import json
import math
import pathlib

import pytest

from benchmarks.gpu.counting import LAST, prompts, share_right
from benchmarks.gpu.gpu_busy import busy_share
from benchmarks.gpu.grpo_vs_trl import OURS, table
from benchmarks.gpu.step_shares import IDLE, NEITHER, shares_of, shares_text
from benchmarks.gpu.tasks import TASKS
from benchmarks.gpu.trl_run import Setting, StepWriter


@pytest.mark.parametrize(
    ("response", "last", "share"),
    [
        ("1, 2, 3, 4", 4, 1.0),
        ("1, 2, 3", 4, 0.75),  # stops short
        ("1, 2, 3, 4, 5, 6, 7, 8", 4, 0.5),  # does not stop
        ("1, 2, 4, 3", 4, 0.5),  # right up to the first mistake
        ("2, 3, 4", 4, 0.0),
        ("one, two", 4, 0.0),
        ("1" * 5000, 4, 0.0),  # more digits than Python converts
    ],
)
def test_counting_is_rewarded_by_the_share_of_right_numbers(response: str, last: int, share: float) -> None:
    assert share_right(response, last) == share


def test_most_prompts_ask_for_short_answers_and_some_for_long_ones() -> None:
    lasts = [int(json.loads(line)["label"]) for line in prompts(400, 7).splitlines()]
    assert min(lasts) >= LAST[0]
    assert max(lasts) <= LAST[1]
    assert sum(last > 60 for last in lasts) >= 40
    assert sorted(lasts)[200] < 30
    assert prompts(400, 7) == prompts(400, 7) != prompts(400, 8)


def test_a_setting_of_trl_is_read_as_it_is_written() -> None:
    for text in ("static-64", "continuous-256", "static-64-bfloat16"):
        assert str(Setting.parse(text)) == text
    with pytest.raises(argparse.ArgumentTypeError, match="is paged, not one of static, continuous"):
        Setting.parse("paged-64")


def test_a_step_of_trl_is_written_with_its_tokens_and_parts(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "steps.jsonl"
    writer = StepWriter(out, TASKS["sums"], lambda: None)
    for _ in range(2):
        rewards = writer.reward([[{"content": "3 + 4 = 7"}], "8"], [[1, 2, 3], [4]], ["7", "7"])
        assert rewards == [1.0, 0.0]
        writer.end_step()
    steps = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(step["samples"], step["response_tokens"], step["longest"]) for step in steps] == [(2, 4, 3)] * 2
    for step in steps:
        assert math.isclose(step["step_s"], step["generate_s"] + step["train_s"])


def test_the_gpu_counts_as_busy_as_the_driver_said_within_the_steps(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.gpu"
    assert busy_share(path, [(0.0, 10.0)]) is None
    path.write_text("1.0,100\n2.0,50\n3.0,0\n9.0,100\n")
    assert busy_share(path, [(1.0, 2.0), (3.0, 3.5)]) == 0.5
    assert busy_share(path, [(4.0, 5.0)]) is None


def put_trl(folder: pathlib.Path, *seconds: float) -> None:
    """A run of TRL that took so long, a step that warms up included."""
    parts = {"generate_s": 0.5, "train_s": 0.2, "samples": 4, "response_tokens": 40, "longest": 20, "reward": 0.5}
    folder.mkdir()
    (folder / "output.log").write_text("")
    lines = [json.dumps({"unix_s": 100.0, "step_s": step_s, **parts}) for step_s in seconds]
    (folder / "steps.jsonl").write_text("\n".join(lines))


def put_ours(folder: pathlib.Path, *seconds: float) -> None:
    """A run of the product that took so long, a step that warms up included."""
    parts = {"rollout/samples": 4, "rollout/response_tokens": 40, "rollout/raw_reward": 0.5}
    times = {"perf/rollout_time": 0.5, "perf/actor_train_time": 0.2, "perf/update_weights_time": 0.1}
    other = {"rollout/response_len/max": 20, "train/train_rollout_logprob_abs_diff": 0.0, "unix_s": 100.0}
    folder.mkdir()
    (folder / "output.log").write_text("")
    lines = [json.dumps({"perf/step_time": step_s, **parts, **times, **other}) for step_s in seconds]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_the_best_setting_of_trl_is_what_the_others_are_compared_with(tmp_path: pathlib.Path) -> None:
    put_ours(tmp_path / OURS, 9.0, 1.0)
    put_trl(tmp_path / "static-64", 9.0, 4.0, 5.0, 3.0)
    put_trl(tmp_path / "continuous-64", 9.0, 8.0)
    put_trl(tmp_path / "static-256", 9.0)
    text = table(tmp_path, {"static-256": "out of memory", "static-128": ""})
    ratios = {line.split(" |")[0][2:]: line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| ")}
    del ratios[""]
    assert ratios == {OURS: "4.00 |", "TRL static-64": "1.00 |", "TRL continuous-64": "0.50 |"}
    assert "static-256: out of memory" in text
    assert "static-128: no step within the deadline" in text


def test_shares_count_each_moment_of_the_steps_once(tmp_path: pathlib.Path) -> None:
    steps = [{"unix_s": end, "perf/step_time": 10.0} for end in (110.0, 120.0, 130.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    spans = [
        {"activity": "generate", "start": 105.0, "end": 114.0},  # begins before the first step that counts
        {"activity": "train", "start": 113.0, "end": 117.0},
        {"activity": "sync", "start": 117.0, "end": 118.0},
        {"activity": "sync", "start": 117.5, "end": 118.0},
        {"activity": "generate", "start": 120.0, "end": 140.0},
        {"activity": "train", "start": 119.0, "end": 120.0, "worker": "trainer-0"},  # a worker's own, not the run's
    ]
    (tmp_path / "timeline.jsonl").write_text("\n".join(json.dumps(span) for span in spans))
    shares = shares_of(tmp_path, skip=1)
    assert shares == pytest.approx({"generate": 0.7, "train": 0.2, "sync": 0.05, IDLE: 0.1, NEITHER: 0.15})
    assert shares_of(tmp_path, skip=3) == {}
    assert shares_text(shares).endswith("idle 10.0%, neither generating nor training 15.0%")
