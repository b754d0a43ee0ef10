from __future__ import annotations

from typing import Any, cast

import pytest

from miles.services.trainer.backends.megatron.parallel.forward_output import LogProbOptions, LogProbOutput
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.step.data_ranks import DataRanks

NO_GROUP = cast("Any", None)


def rank_of(tensor_rank: int, tensor_size: int) -> ParallelRank:
    return ParallelRank(
        tensor_rank, tensor_size, NO_GROUP, 0, 1, NO_GROUP, 0, 1, NO_GROUP, DataRanks(rank=0, count=1, group=None)
    )


@pytest.mark.parametrize(("vocabulary", "ranks"), [(9, 8), (9, 4), (4, 3), (1, 2)])
def test_a_layout_that_leaves_ranks_without_tokens_is_refused_by_all_of_them(vocabulary: int, ranks: int) -> None:
    for rank in range(ranks):
        with pytest.raises(ValueError, match=f"tensor_model_parallel_size = {ranks} leaves ranks without any"):
            LogProbOutput(vocabulary, rank_of(rank, ranks), LogProbOptions(1.0, None))


@pytest.mark.parametrize(("vocabulary", "ranks"), [(10, 4), (8, 8), (5, 1), (7, 4)])
def test_ranks_have_all_tokens_between_them_and_no_padding(vocabulary: int, ranks: int) -> None:
    outputs = [LogProbOutput(vocabulary, rank_of(rank, ranks), LogProbOptions(1.0, None)) for rank in range(ranks)]
    assert all(output._columns > 0 for output in outputs)
    assert sum(output._columns for output in outputs) == vocabulary
