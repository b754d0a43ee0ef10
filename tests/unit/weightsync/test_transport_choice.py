"""Which transport a version is sent by, and by which each engine gets it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rpc.gen.weightsync_pb2 import (
    TRANSPORT_KIND_COLLECTIVE,
    TRANSPORT_KIND_CUDA_IPC,
    TRANSPORT_KIND_DISK_DELTA,
    TRANSPORT_KIND_GRPC_CHUNKS,
    TRANSPORT_KIND_SHARED_MEMORY,
    TRANSPORT_KIND_UNSPECIFIED,
)
from miles.services.weightsync.transport_choice import NoTransport, Placement, place, transport_for, transports_of

AUTO, MAP, DISK, CHUNKS = (
    TRANSPORT_KIND_UNSPECIFIED,
    TRANSPORT_KIND_SHARED_MEMORY,
    TRANSPORT_KIND_DISK_DELTA,
    TRANSPORT_KIND_GRPC_CHUNKS,
)
HERE, ELSEWHERE, WITH_STORAGE = {MAP, CHUNKS}, {CHUNKS}, {DISK, CHUNKS}
IPC = TRANSPORT_KIND_CUDA_IPC
ON_GPU = {IPC, MAP, CHUNKS}


@pytest.mark.parametrize(
    ("trainer", "engines", "folders", "sent", "got"),
    [
        (HERE, [HERE, HERE], False, [MAP], [MAP, MAP]),
        (HERE, [HERE, ELSEWHERE], False, [MAP], [MAP, CHUNKS]),
        (HERE, [], False, [MAP], []),
        (ELSEWHERE, [HERE, ELSEWHERE], False, [CHUNKS], [MAP, CHUNKS]),
        (ELSEWHERE, [], False, [CHUNKS], []),
        (HERE | {DISK}, [HERE | {DISK}], True, [MAP], [MAP]),
        (HERE | {DISK}, [WITH_STORAGE], True, [DISK], [DISK]),
        (HERE | {DISK}, [HERE, WITH_STORAGE, ELSEWHERE], True, [MAP, DISK], [MAP, DISK, CHUNKS]),
        (WITH_STORAGE, [WITH_STORAGE, HERE], True, [CHUNKS, DISK], [DISK, MAP]),
        (WITH_STORAGE, [], True, [DISK], []),
        (ELSEWHERE, [WITH_STORAGE], True, [CHUNKS], [CHUNKS]),
        (HERE, [ON_GPU], False, [IPC], [IPC]),
        (ELSEWHERE, [ON_GPU, {IPC, CHUNKS}], True, [IPC], [IPC, IPC]),
        (HERE, [ON_GPU, HERE], False, [MAP], [MAP, MAP]),
        (HERE | {DISK}, [ON_GPU, WITH_STORAGE], True, [MAP, DISK], [MAP, DISK]),
    ],
)
def test_each_engine_gets_the_best_way_that_it_can_use(
    trainer: set[int], engines: list[set[int]], folders: bool, sent: list[int], got: list[int]
) -> None:
    placement = place(AUTO, trainer, engines, folders=folders)
    assert list(placement.kinds) == sent
    assert [transport_for(placement, usable) for usable in engines] == got


trainers = st.sampled_from([HERE, ELSEWHERE, WITH_STORAGE, HERE | {DISK}])
usable_sets = st.sampled_from([HERE, ELSEWHERE, WITH_STORAGE, HERE | {DISK}, ON_GPU, {IPC, CHUNKS}])


@settings(deadline=None)
@given(trainers, st.lists(usable_sets, max_size=4), st.booleans())
def test_the_trainer_can_send_what_is_chosen_and_every_engine_can_get_it(
    trainer: set[int], engines: list[set[int]], folders: bool
) -> None:
    placement = place(AUTO, trainer, engines, folders=folders)
    assert placement.kinds
    assert set(placement.kinds) <= trainer | {IPC}
    assert IPC not in placement.kinds or placement.kinds == (IPC,), "the checksums of two kinds differ"
    for usable in engines:
        assert transport_for(placement, usable) in usable


def test_a_transport_that_is_named_is_used_by_all() -> None:
    placement = place(CHUNKS, HERE, [HERE, ELSEWHERE], folders=False)
    assert placement == Placement((CHUNKS,), fixed=True)
    assert transport_for(placement, HERE) == CHUNKS
    assert transports_of(place(TRANSPORT_KIND_COLLECTIVE, HERE, [HERE], folders=True)) == [TRANSPORT_KIND_COLLECTIVE]


def test_a_transport_that_the_trainer_cannot_use_is_refused() -> None:
    with pytest.raises(NoTransport, match="the trainer cannot use SHARED_MEMORY, only GRPC_CHUNKS"):
        place(MAP, ELSEWHERE, [], folders=False)
    with pytest.raises(NoTransport, match="--disk-dir"):
        place(DISK, WITH_STORAGE, [], folders=False)
