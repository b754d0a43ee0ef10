from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.controller.clients.orders import Orders

TRAIN = rollout_pb2.GROUP_PURPOSE_TRAIN


def lease(group_id: int, job_id: str = "job") -> rollout_pb2.GroupLease:
    message = rollout_pb2.GroupLease(group_id=group_id, attempt=1, purpose=TRAIN)
    message.group.job_id = job_id
    return message


def group_ids(request: rollout_pb2.RunRequest) -> list[int]:
    return [lease.group_id for lease in request.leases.leases]


async def test_leases_that_wait_together_are_one_message() -> None:
    orders = Orders()
    for group_id in range(3):
        orders.add(lease(group_id))
    assert group_ids(await orders.next()) == [0, 1, 2]


async def test_orders_keep_their_order() -> None:
    orders = Orders()
    orders.add(lease(1))
    orders.add(rollout_pb2.GroupPreempt(group_id=1, attempt=1, purpose=TRAIN))
    orders.add(lease(2))
    first, second, third = [await orders.next() for _ in range(3)]
    assert (group_ids(first), second.preempt.group_id, group_ids(third)) == ([1], 1, [2])


async def test_long_leases_are_sent_in_several_messages() -> None:
    orders = Orders()
    for group_id in range(3):
        orders.add(lease(group_id, "x" * 600_000))
    assert [group_ids(await orders.next()) for _ in range(3)] == [[0], [1], [2]]


async def test_a_lease_longer_than_a_message_should_be_is_sent_alone() -> None:
    orders = Orders()
    for group_id, length in enumerate((3 << 20, 1)):
        orders.add(lease(group_id, "x" * length))
    assert [group_ids(await orders.next()) for _ in range(2)] == [[0], [1]]
