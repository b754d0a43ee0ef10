"""Layers of pipeline stages: even, uneven, in virtual stages, and spelt out."""

from __future__ import annotations

import pytest

from miles.pipeline_split import PipelineSplit, SplitError


def counts(split: PipelineSplit, layers: int) -> list[int]:
    found = [split.layers_of(stage, layers) for stage in range(split.stages)]
    assert sorted(layer for own in found for layer in own) == list(range(layers))
    return [len(own) for own in found]


@pytest.mark.parametrize(
    ("split", "layers", "expected"),
    [
        (PipelineSplit(), 7, [7]),
        (PipelineSplit(4), 8, [2, 2, 2, 2]),
        (PipelineSplit(4, last=13), 61, [16, 16, 16, 13]),
        (PipelineSplit(4, first=14), 62, [14, 16, 16, 16]),
        (PipelineSplit(4, first=1, last=3), 8, [1, 2, 2, 3]),
        (PipelineSplit(2, first=5, last=2), 7, [5, 2]),
        (PipelineSplit(4, with_embedding=True, with_loss=True), 62, [15, 16, 16, 15]),
        (PipelineSplit(2, with_loss=True), 7, [4, 3]),
        (PipelineSplit(2, virtual=2, last=2), 6, [4, 2]),
        (PipelineSplit(4, layout="Et*2|(t|)*2L"), 4, [2, 1, 1, 0]),
    ],
)
def test_every_layer_is_in_one_stage(split: PipelineSplit, layers: int, expected: list[int]) -> None:
    assert counts(split, layers) == expected


@pytest.mark.parametrize(
    ("split", "layers", "expected"),
    [
        (PipelineSplit(2, virtual=2), 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (PipelineSplit(2, virtual_layers=1), 8, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (PipelineSplit(2, virtual=2, last=2), 6, [[0, 1, 3, 4], [2, 5]]),
        (PipelineSplit(2, virtual=2, with_embedding=True, with_loss=True), 6, [[0, 3, 4], [1, 2, 5]]),
        (PipelineSplit(2, layout="Et|t,t|(t|)*1tL"), 5, [[0, 3], [1, 2, 4]]),
    ],
)
def test_virtual_stages_take_turns(split: PipelineSplit, layers: int, expected: list[list[int]]) -> None:
    assert [split.layers_of(stage, layers) for stage in range(2)] == expected


def test_virtual_stages_follow_from_their_layers_and_from_a_layout() -> None:
    assert PipelineSplit(2, virtual_layers=2).virtual_stages(8) == 2
    assert PipelineSplit(2, layout="E|t|t|L").virtual_stages(2) == 2
    assert PipelineSplit(2).virtual_stages(8) == 1


@pytest.mark.parametrize(
    ("split", "setting", "problem"),
    [
        (PipelineSplit(3), "pipeline_model_parallel_size", "it does not divide the model's 8 layers"),
        (PipelineSplit(2, with_loss=True), "pipeline_model_parallel_size", "it does not divide the model's 9 layers"),
        (PipelineSplit(2, virtual=3), "num_virtual_stages_per_pipeline_rank", "the 4 layers of a stage"),
        (PipelineSplit(2, virtual=2, last=3), "num_virtual_stages_per_pipeline_rank", "the 5 layers of a stage"),
        (PipelineSplit(2, 2, first=4, last=4), "decoder_last_pipeline_num_layers", "says it too"),
        (PipelineSplit(2, virtual_layers=3), "num_layers_per_virtual_pipeline_stage", "the 4 layers of a stage"),
        (PipelineSplit(3, last=3), "decoder_last_pipeline_num_layers", "it leaves 5 of the model's 8 layers for 2"),
        (PipelineSplit(2, last=8), "decoder_last_pipeline_num_layers", "it leaves 0 of the model's 8 layers for 1"),
        (PipelineSplit(2, first=3, last=4), "decoder_first_pipeline_num_layers", "it leaves 1 of the model's 8"),
        (PipelineSplit(2, layout="Et*7|tmL"), "pipeline_model_parallel_layout", "MTP layers are always with the last"),
        (PipelineSplit(2, layout="Et*7|xtL"), "pipeline_model_parallel_layout", "it has x"),
        (PipelineSplit(2, layout="t*7|tL"), "pipeline_model_parallel_layout", "E begins the first stage"),
        (PipelineSplit(2, layout="Et*7|L"), "pipeline_model_parallel_layout", "it has 7 layers (t), and the model 8"),
        (PipelineSplit(2, layout="Et*7||tL"), "pipeline_model_parallel_layout", "a stage has nothing"),
        (PipelineSplit(2, layout="Et*7|t|L"), "pipeline_model_parallel_layout", "does not divide its 3 stages"),
        (PipelineSplit(2, 2, layout="Et*7|tL"), "num_virtual_stages_per_pipeline_rank", "has 1 for each rank"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: PipelineSplit, setting: str, problem: str) -> None:
    with pytest.raises(SplitError) as caught:
        split.layers_of(0, 8)
    assert caught.value.setting == setting
    assert problem in caught.value.problem
