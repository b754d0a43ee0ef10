"""Which group of which file stands for a group of the run."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.data import DataError
from miles.rollout_dumps.files import write_rollout
from miles.rollout_dumps.names import rollout_path
from miles.services.controller.run.recorded_rollouts import RecordedGroups
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan


def group(number: int) -> SampleGroup:
    """A group that is known by its only token."""
    sample = Sample(
        group_id=number,
        index=0,
        prompt="p",
        tokens=np.array([number], np.int32),
        response_length=1,
        reward=0.0,
        status=SampleStatus.COMPLETED,
        weight_versions=(VersionSpan(0, 0, 1),),
    )
    return SampleGroup("other", number, [sample])


def recorded(folder: pathlib.Path, **changes: object) -> RecordedGroups:
    """Three rollouts of two groups."""
    template = f"{folder}/{{rollout_id}}.pt"
    for step in range(3):
        write_rollout(rollout_path(template, step), [group(2 * step), group(2 * step + 1)])
    sizes = {"rollout_batch_size": 2, "n_samples_per_prompt": 1, "rewards_normalization": False}
    return RecordedGroups(
        "job", JobConfig.from_flat({**MINIMAL, **sizes, "load_debug_rollout_data": template, **changes})
    )


def taken(groups: RecordedGroups, *ids: int) -> list[int]:
    return [int(groups.group(group_id).samples[0].tokens[0]) for group_id in ids]


def test_a_new_run_takes_them_in_order(tmp_path: pathlib.Path) -> None:
    groups = recorded(tmp_path)
    assert taken(groups, 0, 1, 4, 5, 2, 3) == [0, 1, 4, 5, 2, 3]
    found = groups.group(3)
    assert (found.job_id, found.group_id, found.samples[0].group_id) == ("job", 3, 3)


def test_a_run_that_goes_on_takes_those_of_its_step_whatever_was_dropped_before(tmp_path: pathlib.Path) -> None:
    groups = recorded(tmp_path)
    groups.begin_at(step=1, consumed_below=7, consumed_ids=[8])
    assert taken(groups, 7, 9, 10, 11) == [2, 3, 4, 5]


def test_a_share_is_taken_from_both_ends(tmp_path: pathlib.Path) -> None:
    write_rollout(tmp_path / "all.pt", [group(number) for number in range(8)])
    name = str(tmp_path / "all.pt")
    groups = recorded(tmp_path, load_debug_rollout_data=name, load_debug_rollout_data_subsample=0.25)
    assert taken(groups, 0, 1, 2) == [0, 7, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout_batch_size": 4}, "has 2 groups, but rollout_batch_size = 4; set it to 2"),
        ({"n_samples_per_prompt": 2}, "group 0 of .* has 1 samples, but n_samples_per_prompt = 2"),
        (
            {"load_debug_rollout_data_subsample": 0.5},
            "subsample = 0.5 leaves 1, but rollout_batch_size = 2; set it to 1",
        ),
    ],
)
def test_a_file_of_another_size_is_refused(tmp_path: pathlib.Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        recorded(tmp_path, **changes).group(0)
