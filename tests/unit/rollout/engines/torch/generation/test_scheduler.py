"""Which requests hold a slot and what each computes: the pure part."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch.generation.scheduler import Plan, Scheduler
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.generation.stop import StopRule


def sequence(name: str, prompt: list[int], resumed: int = 0, routed: bool = False) -> Sequence:
    request = GenerationRequest(name, prompt, SamplingParams(max_new_tokens=50), resumed, routed)
    return Sequence(request, StopRule((), None, 0))


def draw(plan: Plan) -> None:
    """Give every sequence that the plan completes its next token."""
    for item in plan.decode:
        item.append(0, 1)
    for chunk in plan.prefill:
        if chunk.completes:
            chunk.sequence.append(0, 1)
    for share in plan.shares:
        share.target.append(0, 1)


def test_requests_get_slots_in_the_order_they_came() -> None:
    scheduler = Scheduler(2, 100)
    first, second, third = (sequence(name, [i, 1]) for i, name in enumerate("abc"))
    for item in (first, second, third):
        scheduler.add(item)
    plan = scheduler.plan()
    assert [chunk.sequence for chunk in plan.prefill] == [first, second]
    assert scheduler.waiting == [third]
    draw(plan)
    scheduler.remove(first)
    plan = scheduler.plan()
    assert plan.decode == [second]
    assert [(chunk.sequence, third.slot) for chunk in plan.prefill] == [(third, 0)]


def test_a_group_computes_its_prompt_once() -> None:
    scheduler = Scheduler(8, 100)
    group = [sequence(str(i), [1, 2, 3]) for i in range(4)]
    other = sequence("x", [1, 2, 4])
    for item in (*group, other):
        scheduler.add(item)
    plan = scheduler.plan()
    assert [(chunk.sequence, chunk.end) for chunk in plan.prefill] == [(group[0], 3), (other, 3)]
    assert [(share.source, share.target, share.length) for share in plan.shares] == [
        (group[0], item, 3) for item in group[1:]
    ]
    draw(plan)
    assert [item.pending for item in group] == [1, 1, 1, 1]
    assert len(scheduler.plan().decode) == 5


def test_a_late_member_of_a_group_copies_all_but_the_last_prompt_token() -> None:
    scheduler = Scheduler(8, 100)
    first, late = sequence("a", [1, 2, 3]), sequence("b", [1, 2, 3])
    scheduler.add(first)
    draw(scheduler.plan())
    scheduler.add(late)
    plan = scheduler.plan()
    assert [(copy.source, copy.target, copy.length) for copy in plan.copies] == [(first, late, 2)]
    assert plan.decode == [first, late]
    assert late.cached_prompt_tokens == 2


def test_a_resumed_member_copies_the_prompt_and_computes_its_own_response() -> None:
    scheduler = Scheduler(8, 100)
    first, resumed = sequence("a", [1, 2, 3]), sequence("b", [1, 2, 3, 9, 9, 9], resumed=3)
    scheduler.add(first)
    draw(scheduler.plan())
    scheduler.add(resumed)
    plan = scheduler.plan()
    assert [(copy.source, copy.length) for copy in plan.copies] == [(first, 3)]
    assert [(chunk.start, chunk.end) for chunk in plan.prefill] == [(3, 6)]


def test_long_prompts_are_computed_in_chunks_while_others_decode() -> None:
    scheduler = Scheduler(8, 4)
    short, long = sequence("a", [1, 2]), sequence("b", list(range(10)))
    scheduler.add(short)
    draw(scheduler.plan())
    scheduler.add(long)
    spans = []
    for _ in range(3):
        plan = scheduler.plan()
        assert plan.decode == [short]
        spans += [(chunk.start, chunk.end) for chunk in plan.prefill]
        draw(plan)
    assert spans == [(0, 4), (4, 8), (8, 10)]
    assert scheduler.plan().decode == [short, long]


def test_what_has_computed_nothing_changes_its_slot_without_a_move() -> None:
    scheduler = Scheduler(8, 4)
    short, owner, waits = sequence("a", [1, 2]), sequence("b", list(range(10))), sequence("c", list(range(10)))
    for item in (short, owner, waits):
        scheduler.add(item)
    plan = scheduler.plan()
    assert [chunk.sequence for chunk in plan.prefill] == [short, owner]
    scheduler.remove(short)
    plan = scheduler.plan()
    assert (plan.moves, waits.slot, waits.computed) == ([], 0, 0)
    scheduler.remove(waits)
    plan = scheduler.plan()
    assert [(move.source, move.target, move.length) for move in plan.moves] == [(1, 0, 6)]


def test_keys_of_older_weights_are_not_shared() -> None:
    scheduler = Scheduler(8, 100)
    old = sequence("a", [1, 2, 3])
    scheduler.add(old)
    draw(scheduler.plan())
    scheduler.weights_changed()
    new = sequence("b", [1, 2, 3])
    scheduler.add(new)
    plan = scheduler.plan()
    assert plan.copies == plan.shares == []
    assert [chunk.sequence for chunk in plan.prefill] == [new]


def test_a_request_that_records_routing_does_not_share_with_one_that_does_not() -> None:
    scheduler = Scheduler(8, 100)
    for item in (sequence("a", [1, 2, 3]), sequence("b", [1, 2, 3], routed=True)):
        scheduler.add(item)
    assert len(scheduler.plan().prefill) == 2


def test_retracted_sequences_come_back_first_and_in_order() -> None:
    scheduler = Scheduler(2, 100)
    items = [sequence(str(i), [i, 1]) for i in range(3)]
    for item in items:
        scheduler.add(item)
    draw(scheduler.plan())
    scheduler.retract_all()
    assert scheduler.running == []
    assert scheduler.waiting == items
    assert items[0].computed == 0
    assert [chunk.end for chunk in scheduler.plan().prefill] == [3, 3]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events; a model of the cache checks that every token is computed from the right keys."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 4
        self.scheduler = Scheduler(self.slots, 5)
        self.live: list[Sequence] = []
        self.cache: dict[int, list[tuple[int, int]]] = {slot: [] for slot in range(self.slots)}
        self.version = 1
        self.count = 0

    @rule(prompt=st.sampled_from([[1], [1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [4, 4]]), resumed=st.integers(0, 3))
    def add(self, prompt: list[int], resumed: int) -> None:
        self.count += 1
        item = sequence(str(self.count), [*prompt, *([8] * resumed)], resumed)
        self.live.append(item)
        self.scheduler.add(item)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.live))
        self.live.remove(item)
        self.scheduler.remove(item)

    @rule()
    def retract(self) -> None:
        self.scheduler.retract_all()

    @rule()
    def change_weights(self) -> None:
        self.version += 1
        self.scheduler.weights_changed()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        plan = self.scheduler.plan()
        for move in plan.moves:
            assert 0 < move.length <= len(self.cache[move.source])
            self.cache[move.target] = self.cache[move.source][: move.length]
        for copy in plan.copies:
            self.cache[copy.target.slot] = self.cache[copy.source.slot][: copy.length]
            assert all(version == self.version for _, version in self.cache[copy.target.slot])
        accepted = {}
        for item in plan.decode:
            self.compute(item, len(item.tokens) - 1, len(item.tokens))
            kept, rejected = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 2)))
            accepted[item.slot] = kept
            self.cache[item.slot] += [(0, self.version)] * kept + [(9, self.version)] * rejected
        for chunk in plan.prefill:
            self.compute(chunk.sequence, chunk.start, chunk.end)
        for share in plan.shares:
            self.cache[share.target.slot] = self.cache[share.source.slot][: share.length]
        for item in self.scheduler.running:
            assert [token for token, _ in self.cache[item.slot][: item.computed]] == item.tokens[: item.computed]
        assert sum(chunk.end - chunk.start for chunk in plan.prefill) <= 5
        assert not (plan.empty and self.live)
        draw(plan)
        for item in plan.decode:
            for _ in range(accepted[item.slot]):
                item.append(0, 1)
            item.computed += accepted[item.slot]
            assert item.pending == 1

    def compute(self, item: Sequence, start: int, end: int) -> None:
        kept = self.cache[item.slot][:start]
        assert [token for token, _ in kept] == item.tokens[:start]
        self.cache[item.slot] = kept + [(token, self.version) for token in item.tokens[start:end]]

    @invariant()
    def every_sequence_runs_or_waits_in_one_place(self) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert sorted(map(id, [*running, *waiting])) == sorted(map(id, self.live))
        assert len({item.slot for item in running}) == len(running) <= self.slots
        assert all(item.slot == -1 and item.computed == 0 for item in waiting)


TestScheduler = SchedulerMachine.TestCase
