"""Every evaluation is a point of its own, also beside a training step and after a resume."""

from __future__ import annotations

import pathlib
from typing import Any

from config_cases import MINIMAL

from miles.config import JobConfig
from miles.rpc.gen import records_pb2
from miles.services.controller.artifacts.metrics import MetricLog
from miles.services.controller.run.evaluation import Evaluation, ScoredResponse
from miles.telemetry import MetricsWriter
from miles.types import Sample, SampleStatus


def series(path: pathlib.Path, name: str) -> dict[int, float]:
    log = MetricLog(path)
    log.refresh()
    found = log.select(records_pb2.ListMetricsRequest(names=[name])).series[0]
    return dict(zip(found.steps, found.values, strict=True))


def evaluated(writer: MetricsWriter, version: int, score: float) -> None:
    writer.write(version, {"eval/sort": score, "eval/sort/weight_version": version})


def test_the_evaluation_of_the_loaded_version_stays_when_a_run_resumes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for version, score in ((0, 0.25), (1, 0.5), (2, 0.75)):
        evaluated(writer, version, score)
        writer.write(version, {"train/loss": score})
    writer.close()
    resumed = MetricsWriter(path, 1, keep_evaluation=True)
    resumed.write(1, {"train/loss": 9.0})
    resumed.close()
    assert series(path, "eval/sort") == {0: 0.25, 1: 0.5}
    assert series(path, "train/loss") == {0: 0.25, 1: 9.0}


def test_an_evaluation_that_is_repeated_replaces_the_one_before(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    evaluated(writer, 1, 0.5)
    writer.close()
    resumed = MetricsWriter(path, 1)
    evaluated(resumed, 1, 0.5)
    resumed.close()
    assert path.read_text().count("\n") == 1


class _Prompts(list[str]):
    """Prompts of a set, of which an evaluation asks the number alone here."""


def evaluation(rewards: list[float | None]) -> Evaluation:
    config = JobConfig.from_flat({**MINIMAL, "eval_prompt_data": ["sums", "sums.jsonl"], "eval_interval": 1})
    prompts: Any = _Prompts(["1+1="] * len(rewards))
    made = Evaluation("job", config, {"sums": prompts}, 3)
    for group_id, reward in enumerate(rewards):
        status = SampleStatus.FAILED if reward is None else SampleStatus.COMPLETED
        metadata = {} if reward is not None else {"reward_error": "no answer from host:1"}
        sample = Sample(group_id=group_id, index=0, prompt="1+1=", reward=reward, status=status, metadata=metadata)
        made._results[group_id] = [ScoredResponse.of(sample)]
    return made


async def test_samples_without_a_reward_are_said_beside_the_score() -> None:
    made = evaluation([1.0, None, None, None])
    metrics = made._metrics()
    assert (metrics["eval/sums"], metrics["eval/sums/failed_ratio"]) == (0.25, 0.75)
    assert made.warnings == [
        "evaluation on sums: 3 of 4 samples have no reward, they count as 0; e.g. no answer from host:1"
    ]


async def test_a_set_of_which_every_sample_fails_has_no_score() -> None:
    made = evaluation([None, None])
    assert made._metrics() == {"eval/sums/failed_ratio": 1.0}
    assert "2 of 2 samples have no reward, it has no score" in made.warnings[0]
