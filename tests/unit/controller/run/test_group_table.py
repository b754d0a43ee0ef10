from __future__ import annotations

import random

from miles.services.controller.run.group_table import HeldGroups, Lease


def test_a_lost_worker_gives_back_its_groups_and_no_other() -> None:
    held = HeldGroups()
    for group_id, worker in enumerate("abab"):
        held.begin(group_id, Lease(worker, 1))
    assert held.end(0, 1)
    assert not held.end(0, 1)
    assert not held.end(2, 7)
    assert held.lose_worker("a") == [2]
    assert held.lose_worker("a") == held.lose_worker("nobody") == []
    assert held == {1: Lease("b", 1), 3: Lease("b", 1)}


def test_it_says_what_a_dictionary_would() -> None:
    chance, held, leases = random.Random(0), HeldGroups(), dict[int, Lease]()
    for _ in range(2000):
        group_id, worker, attempt = chance.randrange(30), chance.choice("abc"), chance.randrange(2)
        if group_id not in leases and chance.random() < 0.6:
            leases[group_id] = Lease(worker, attempt)
            held.begin(group_id, leases[group_id])
        elif chance.random() < 0.9:
            known = group_id in leases and leases[group_id].attempt == attempt
            assert held.end(group_id, attempt) == known
            if known:
                del leases[group_id]
        else:
            lost = [group for group, lease in leases.items() if lease.worker_id == worker]
            assert sorted(held.lose_worker(worker)) == sorted(lost)
            for group in lost:
                del leases[group]
        assert held == leases
        assert len(held) == len(leases)
