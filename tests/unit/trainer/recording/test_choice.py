"""Which samples are recorded: as many as there is room for, of all replicas, of all lengths, the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from trainer_cases import job_config, random_groups, write_dense_model

from miles.services.trainer.batch.rollout_batch import in_order
from miles.services.trainer.batch.rollout_schedule import StepSchedule, schedule_rollout
from miles.services.trainer.recording.choice import choose, indices_of
from miles.types import Sample


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return in_order(random_groups(5))


@pytest.fixture(scope="module")
def step(samples: tuple[Sample, ...], tmp_path_factory: pytest.TempPathFactory) -> StepSchedule:
    """Of two replicas; the samples of the last group have no gradient."""
    config = job_config(write_dense_model(tmp_path_factory.mktemp("dense")))
    return schedule_rollout(samples, config, 2, without_gradient=range(12, 16)).steps[0]


def tokens(samples: tuple[Sample, ...], chosen: tuple[int, ...]) -> int:
    return sum(len(samples[index].tokens) for index in chosen)


def test_all_are_chosen_where_there_is_room(samples: tuple[Sample, ...], step: StepSchedule) -> None:
    assert choose(samples, step, 10_000, (0, 0)) == tuple(range(16))
    assert sorted(indices_of(step)) == list(range(16))


@pytest.mark.parametrize("budget", [0, 1, 20, 60, 120])
def test_the_budget_is_kept_and_used(samples: tuple[Sample, ...], step: StepSchedule, budget: int) -> None:
    for seed in range(20):
        chosen = choose(samples, step, budget, (seed, 0))
        assert chosen == choose(samples, step, budget, (seed, 0))
        assert list(chosen) == sorted(set(chosen))
        rest = budget - tokens(samples, chosen)
        assert rest >= 0
        assert all(len(samples[index].tokens) > rest for index in set(range(16)) - set(chosen))


def test_replicas_and_samples_take_turns(samples: tuple[Sample, ...], step: StepSchedule) -> None:
    counts = np.zeros(16)
    of_replica = [0, 0]
    shares = [{i for cut in (*step.micro_batches[r], *step.observed[r]) for i in cut} for r in range(2)]
    for number in range(400):
        chosen = choose(samples, step, 60, (0, number))
        counts[list(chosen)] += 1
        for replica, share in enumerate(shares):
            of_replica[replica] += len(share & set(chosen))
    assert counts.min() > 0.15 * counts.max()
    longest = max(range(16), key=lambda index: len(samples[index].tokens))
    assert counts[longest] > 20
    assert 0.8 < of_replica[0] / of_replica[1] < 1.25
