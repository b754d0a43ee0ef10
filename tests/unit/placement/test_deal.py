from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.placement.deal import Demand, NoRoomError, Place, deal

DEMANDS = st.builds(
    Demand,
    trainer_nodes=st.integers(1, 3),
    trainer_gpus=st.integers(1, 8),
    services=st.integers(1, 4),
    servers=st.lists(st.integers(1, 8), max_size=4).map(tuple),
    colocate=st.booleans(),
    rollout_gpus_of_node=st.none() | st.integers(1, 8),
)
NODES = st.lists(st.integers(1, 8), min_size=1, max_size=4)


def demand(**changes: Any) -> Demand:
    engines, gpus = changes.pop("engines", 8), changes.pop("engine_gpus", 1)
    return Demand(**{"trainer_nodes": 1, "trainer_gpus": 8, "services": 1, "servers": (gpus,) * engines, **changes})


@settings(deadline=None)
@given(NODES, DEMANDS)
def test_no_gpu_has_two_owners_unless_they_share_on_purpose(nodes: list[int], asked: Demand) -> None:
    try:
        placement = deal(nodes, asked)
    except NoRoomError:
        return
    trainer = [(place.node, gpu) for place in placement.trainer for gpu in place.gpus]
    rollouts = [(place.node, gpu) for place in placement.rollouts for gpu in place.gpus]
    assert len(set(trainer)) == len(trainer) == asked.trainer_nodes * asked.trainer_gpus
    assert len(rollouts) == asked.rollout_gpus
    if not asked.colocate:
        assert len(set(rollouts)) == len(rollouts)
    assert all(0 <= gpu < nodes[node] for node, gpu in trainer + rollouts)
    if asked.rollout_gpus_of_node is not None:
        assert all(len(set(gpus)) <= asked.rollout_gpus_of_node for gpus in by_node(rollouts).values())

    assert set(rollouts) <= set(trainer) if asked.colocate else not set(rollouts) & set(trainer)
    for place in placement.rollouts:
        assert list(place.gpus) == list(range(min(place.gpus, default=0), min(place.gpus, default=0) + len(place.gpus)))


@settings(deadline=None)
@given(NODES, DEMANDS)
def test_what_one_node_has_room_for_is_never_refused(nodes: list[int], asked: Demand) -> None:
    needed = asked.trainer_gpus if asked.colocate else asked.trainer_gpus + asked.rollout_gpus
    if asked.colocate and asked.rollout_gpus > asked.trainer_gpus:
        return
    if asked.trainer_nodes == 1 and nodes[0] >= max(needed, asked.trainer_gpus):
        placement = deal(nodes, asked)
        assert {place.node for place in (*placement.trainer, *placement.rollouts)} <= set(range(len(nodes)))


def test_the_trainer_comes_first_and_rollouts_follow_on_its_node_or_the_next() -> None:
    placement = deal([8, 8], demand())
    assert placement.trainer == (Place(0, tuple(range(8))),)
    assert placement.rollouts == (Place(1, tuple(range(8))),)
    placement = deal([8], demand(trainer_gpus=4, services=2, engines=1, engine_gpus=2))
    assert placement.rollouts == (Place(0, (4, 5)), Place(0, (6, 7)))
    placement = deal([4, 4, 8], demand(trainer_nodes=2, trainer_gpus=4))
    assert ([place.node for place in placement.trainer], placement.rollouts) == ([0, 1], (Place(2, tuple(range(8))),))


@pytest.mark.parametrize(
    ("nodes", "changes", "rollout_nodes", "refusal"),
    [
        ([8], {}, None, "rollout_num_gpus = 8, but the trainer's 8 leave 0 of the 8 GPUs; turn colocate on"),
        ([8, 8], {}, 1, "rollout_num_gpus = 8, but the trainer leaves 0 of this node's 8 GPUs; turn colocate on"),
        ([4], {}, None, "actor_num_gpus_per_node = 8, but node 0 has 4 GPUs; set it to at most 4, and use"),
        ([8, 4], {"trainer_nodes": 2}, None, "actor_num_gpus_per_node = 8, but node 1 has 4 GPUs; set it to at most"),
        ([8], {"trainer_nodes": 2}, None, "actor_num_nodes = 2, but there is 1 node; set it to 1, or use more nodes"),
        (
            [8, 8, 8],
            {"engines": 1, "engine_gpus": 16},
            None,
            "rollout_num_gpus_per_engine = 16, but a server's GPUs are on one node, and the largest has 8 GPUs; lower",
        ),
        (
            [8, 8, 8],
            {"engines": 16},
            None,
            "rollout_num_workers = 1, but each service's 16 GPUs are on one node, and no node has as many left; "
            "set it to 2 or more",
        ),
        (
            [4],
            {"trainer_gpus": 2, "services": 3, "engines": 1},
            None,
            "rollout_num_workers = 3, but the trainer's 2 leave 2 of the 4 GPUs; turn colocate on",
        ),
        (
            [8],
            {"trainer_gpus": 2, "engines": 4, "colocate": True},
            None,
            "rollout_num_gpus = 4, but a service's 4 GPUs are on one node, where colocate leaves the trainer's alone",
        ),
    ],
)
def test_a_refusal_names_the_setting_and_the_way_out(
    nodes: list[int], changes: dict[str, Any], rollout_nodes: int | None, refusal: str
) -> None:
    with pytest.raises(NoRoomError) as error:
        deal(nodes, demand(**changes), rollout_nodes=rollout_nodes)
    assert str(error.value).startswith(refusal)


def test_engines_that_run_elsewhere_need_no_gpu() -> None:
    assert deal([8], demand(services=2, engines=1, engine_gpus=0)).rollouts == (Place(0, ()), Place(0, ()))


def test_colocated_services_take_other_parts_of_the_trainers_gpus_and_then_the_same() -> None:
    parts = deal([8], demand(trainer_gpus=4, services=3, engines=1, engine_gpus=2, colocate=True)).rollouts
    assert [place.gpus for place in parts] == [(0, 1), (2, 3), (0, 1)]


def by_node(places: list[tuple[int, int]]) -> dict[int, list[int]]:
    """GPU numbers by node."""
    found: dict[int, list[int]] = {}
    for node, gpu in places:
        found.setdefault(node, []).append(gpu)
    return found


def test_rollouts_get_so_many_gpus_of_each_node() -> None:
    asked = demand(trainer_gpus=2, services=3, engines=1, engine_gpus=2, rollout_gpus_of_node=4)
    places = deal([8, 8], asked).rollouts
    assert places == (Place(0, (2, 3)), Place(0, (4, 5)), Place(1, (0, 1)))
    shared = demand(trainer_gpus=8, services=2, engines=2, engine_gpus=2, colocate=True, rollout_gpus_of_node=4)
    assert deal([8], shared).rollouts == (Place(0, (0, 1, 2, 3)), Place(0, (0, 1, 2, 3)))


def test_a_limit_that_leaves_no_room_is_named() -> None:
    for changes in ({"services": 1, "engine_gpus": 8}, {"services": 4, "engine_gpus": 2}):
        asked = demand(trainer_nodes=0, engines=1, rollout_gpus_of_node=4, **changes)
        with pytest.raises(NoRoomError) as error:
            deal([8], asked)
        assert (error.value.setting, error.value.value) == ("num_gpus_per_node", 4)
    with pytest.raises(NoRoomError) as error:
        deal([4], demand(trainer_nodes=0, engines=1, engine_gpus=8, rollout_gpus_of_node=4))
    assert error.value.setting == "rollout_num_gpus_per_engine"


def test_servers_of_different_sizes_share_a_service() -> None:
    places = deal([8, 8], demand(trainer_gpus=2, services=2, servers=(1, 1, 4))).rollouts
    assert places == (Place(0, (2, 3, 4, 5, 6, 7)), Place(1, (0, 1, 2, 3, 4, 5)))
