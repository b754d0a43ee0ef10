from __future__ import annotations

import numpy as np
import pytest

from miles.config import JobConfig
from miles.config.eval_sets import eval_sets
from miles.data import PromptSource
from miles.data.prompts import PromptRecord, PromptSet
from miles.services.controller.run.lease_messages import evaluation_lease, training_lease
from miles.services.controller.run.seeds import sample_seeds
from miles.services.rollout.groups.messages import lease_from_proto
from tests.support.config_cases import MINIMAL

RECORD = PromptRecord([{"role": "user", "content": "2+3="}], np.array([4, 5, 6], np.int32), "5", {"level": {"n": 1}})
SOURCE = PromptSource(PromptSet("here", [RECORD], 1))
GIVEN = MINIMAL | {
    "n_samples_per_prompt": 3,
    "eval_prompt_data": ["set", "set.jsonl"],
    "eval_max_response_len": 8,
    "eval_interval": 1,
}
CONFIG = JobConfig.from_flat(GIVEN)


def test_a_training_lease_gives_each_sample_its_index_and_seed() -> None:
    lease = lease_from_proto(training_lease(CONFIG, SOURCE.group("job", 7, 1), 2, 4, 5))
    assert lease.group == SOURCE.group("job", 7, 3)
    assert [each.seed for each in lease.sampling] == sample_seeds(CONFIG.rollout.rollout_seed, "train", 7, 3)
    assert {each.max_new_tokens for each in lease.sampling} == {16}
    assert (lease.attempt, lease.min_version, lease.newest_version, len(lease.skip_special_tokens)) == (2, 4, 5, 3)


def test_samples_of_a_lease_share_nothing_that_changes() -> None:
    first, second, _ = lease_from_proto(training_lease(CONFIG, SOURCE.group("job", 7, 1), 1, 0, 0)).group.samples
    first.metadata["level"]["n"] = 2
    assert isinstance(first.prompt, list)
    first.prompt[0]["content"] = "other"
    assert (second.metadata, second.prompt) == (RECORD.metadata, RECORD.prompt)


@pytest.mark.parametrize("samples", [1, 2])
def test_an_evaluation_lease_has_seeds_of_its_own(samples: int) -> None:
    config = JobConfig.from_flat(GIVEN | {"n_samples_per_eval_prompt": samples})
    (dataset,) = eval_sets(config.to_flat())
    lease = lease_from_proto(evaluation_lease(config, dataset, SOURCE.group("job", 7, 1), 1, 3))
    assert [each.seed for each in lease.sampling] == sample_seeds(config.rollout.rollout_seed, "eval/set", 7, samples)
    assert (lease.exact_version, len(lease.group.samples)) == (3, samples)
