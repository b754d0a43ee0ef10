"""Dumped rollouts: names of files, our format, and what torch.save wrote."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from miles.rollout_dumps.files import read_rollout, subsample, write_rollout
from miles.rollout_dumps.names import rollout_path
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan


def group(group_id: int, samples: int = 2) -> SampleGroup:
    def sample(index: int) -> Sample:
        return Sample(
            group_id=group_id,
            index=index,
            prompt="1+1=",
            tokens=np.array([5, 6, 7 + index], np.int32),
            response_length=1,
            response="2",
            reward=0.5,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=np.array([-0.25], np.float32),
            weight_versions=(VersionSpan(3, 0, 1),),
        )

    return SampleGroup("job", group_id, [sample(index) for index in range(samples)])


def row(**changes: Any) -> dict[str, Any]:
    """A sample as other systems dump it."""
    return {
        "group_index": 0,
        "index": 11,
        "prompt": [{"role": "user", "content": "1+1="}],
        "tokens": [5, 6, 7],
        "response_length": 2,
        "response": "2",
        "label": "2",
        "reward": 1,
        "loss_mask": [1, 0],
        "rollout_log_probs": [-0.5, -0.25],
        "weight_versions": ["4"],
        "rollout_routed_experts": np.array([[[0, 300]], [[1, 2]]], np.int32),
        "status": "truncated",
        "metadata": {"level": 3},
        "multimodal_inputs": None,
        "spec_info": {"spec_accept_token_num": 0},
        **changes,
    }


def saved(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    torch.save({"rollout_id": 0, "metadata": {}, "samples": rows}, path)
    return path


def test_groups_are_read_as_they_were_written(tmp_path: pathlib.Path) -> None:
    groups = [group(3), group(5)]
    path = rollout_path(f"{tmp_path}/new/{{rollout_id}}.pt", 7)
    write_rollout(path, groups)
    assert path.name == "7.pt"
    assert read_rollout(path, 2, 0) == groups
    assert [each.name for each in path.parent.iterdir()] == ["7.pt"]


def test_half_of_a_share_comes_from_each_end() -> None:
    groups = [group(number) for number in range(8)]
    assert [each.group_id for each in subsample(groups, 0.5)] == [0, 1, 6, 7]
    assert [each.group_id for each in subsample(groups, 0.4)] == [0, 6, 7]
    assert subsample(groups, 0.1) == []


def test_a_torch_file_of_plain_values_is_read(tmp_path: pathlib.Path) -> None:
    rows = [
        row(),
        row(group_index=1),
        row(tokens=torch.tensor([5, 6, 8])),
        row(group_index=1, reward={"a": 2, "b": ""}),
    ]
    groups = read_rollout(saved(tmp_path / "0.pt", rows), 2, 9)
    assert [[sample.tokens[-1] for sample in each.samples] for each in groups] == [[7, 8], [7, 7]]
    first = groups[0].samples[0]
    assert (first.status, first.reward, first.label, first.metadata) == (SampleStatus.TRUNCATED, 1.0, "2", {"level": 3})
    assert first.weight_versions == (VersionSpan(9, 0, 2),)
    for values, expected in (
        (first.loss_mask, [1, 0]),
        (first.rollout_log_probs, [-0.5, -0.25]),
        (first.rollout_routed_experts, [[[0, 300]], [[1, 2]]]),
    ):
        assert np.asarray(values).tolist() == expected
    assert groups[1].samples[1].reward == {"a": 2.0}


def test_samples_without_a_group_are_grouped_in_order(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path / "0.pt", [row(group_index=None) for _ in range(6)])
    assert [len(each.samples) for each in read_rollout(path, 3, 0)] == [3, 3]
    with pytest.raises(
        ValueError, match="6 samples without group_index, which n_samples_per_prompt = 4 does not divide"
    ):
        read_rollout(path, 4, 0)


class Foreign:
    """A class of somebody else's."""


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(prompt=Foreign())], "no torch file of plain values"),
        ([], "holds no list of samples"),
        ([row(multimodal_inputs={"image": 1})], "sample 0 of .* multimodal_inputs is set"),
        ([row(), {"tokens": [1]}], "sample 1 of .*: it has no response_length"),
        ([row(rollout_log_probs=[0.0])], r"group 0 of .*rollout_log_probs: 1 entries"),
        ([row(status="odd")], "'odd' is not a valid SampleStatus"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path: pathlib.Path, rows: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_rollout(saved(tmp_path / "0.pt", rows), 1, 0)
