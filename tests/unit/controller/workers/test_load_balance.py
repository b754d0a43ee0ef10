"""Who gets the next group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.services.controller.workers.load_balance import LoadBalance


def test_the_least_loaded_worker_with_room_is_next() -> None:
    balance = LoadBalance()
    assert balance.next() is None
    balance.set_capacity("a", 0)
    assert balance.next() is None
    balance.set_capacity("a", 2)
    balance.set_capacity("b", 1)
    taken = []
    while (worker := balance.next()) is not None:
        balance.add_group(worker)
        taken.append(worker)
    assert taken == ["a", "b", "a"]
    balance.remove_group("b")
    assert balance.next() == "b"
    balance.remove_worker("b")
    assert balance.next() is None
    balance.remove_group("b")
    balance.remove_group("a")
    assert balance.next() == "a"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["take", "give", "grow", "shrink", "remove"]))))
def test_it_always_agrees_with_a_plain_search(events: list[tuple[str, str]]) -> None:
    balance = LoadBalance()
    groups: dict[str, int] = {}
    capacity: dict[str, int] = {}
    for worker, event in events:
        if event in ("grow", "shrink"):
            capacity[worker] = 3 if event == "grow" else 1
            groups.setdefault(worker, 0)
            balance.set_capacity(worker, capacity[worker])
        elif event == "remove":
            groups.pop(worker, None)
            balance.remove_worker(worker)
        elif event == "give":
            balance.remove_group(worker)
            if worker in groups:
                groups[worker] -= 1
        elif worker in groups:
            balance.add_group(worker)
            groups[worker] += 1
        with_room = [(count, name) for name, count in groups.items() if count < capacity[name]]
        assert balance.next() == (min(with_room)[1] if with_room else None)
