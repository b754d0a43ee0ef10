from __future__ import annotations

import random

from miles.services.controller.run.group_leases import GroupLease, GroupLeases


def test_a_lost_worker_gives_back_its_groups_and_no_other() -> None:
    table = GroupLeases()
    for group_id, worker in enumerate("abab"):
        table.begin(group_id, GroupLease(worker, 1))
    assert table.end(0, 1)
    assert not table.end(0, 1)
    assert not table.end(2, 7)
    assert table.lose_worker("a") == [2]
    assert table.lose_worker("a") == table.lose_worker("nobody") == []
    assert table == {1: GroupLease("b", 1), 3: GroupLease("b", 1)}


def test_it_says_what_a_dictionary_would() -> None:
    chance, table, leases = random.Random(0), GroupLeases(), dict[int, GroupLease]()
    for _ in range(2000):
        group_id, worker, attempt = chance.randrange(30), chance.choice("abc"), chance.randrange(2)
        if group_id not in leases and chance.random() < 0.6:
            leases[group_id] = GroupLease(worker, attempt)
            table.begin(group_id, leases[group_id])
        elif chance.random() < 0.9:
            known = group_id in leases and leases[group_id].attempt == attempt
            assert table.end(group_id, attempt) == known
            if known:
                del leases[group_id]
        else:
            lost = [group for group, lease in leases.items() if lease.worker_id == worker]
            assert sorted(table.lose_worker(worker)) == sorted(lost)
            for group in lost:
                del leases[group]
        assert table == leases
        assert len(table) == len(leases)
