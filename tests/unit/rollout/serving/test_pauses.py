from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miles.services.rollout.serving.pauses import PauseRefused, Pauses, Step


def test_a_pause_and_its_resume_act_once_each() -> None:
    pauses = Pauses()
    assert pauses.pause("a", 10, now=0) is Step.PAUSE
    assert pauses.pause("a", 10, now=1) is Step.NOTHING
    assert pauses.resume("a") is Step.RESUME
    assert pauses.resume("a") is Step.NOTHING
    assert pauses.pause("a", 10, now=2) is Step.NOTHING
    assert pauses.operation_id is None


def test_a_repeated_pause_does_not_renew_the_lease() -> None:
    pauses = Pauses()
    pauses.pause("a", 10, now=0)
    pauses.pause("a", 10, now=9)
    assert not pauses.tick(9.9)
    assert pauses.tick(10)


def test_only_one_operation_holds_the_engine() -> None:
    pauses = Pauses()
    pauses.pause("a", 10, now=0)
    with pytest.raises(PauseRefused, match="'a' holds"):
        pauses.pause("b", 10, now=0)
    with pytest.raises(PauseRefused, match="operation 'a' does"):
        pauses.resume("b")


def test_an_expired_pause_is_reported_once_and_cannot_be_resumed() -> None:
    pauses = Pauses()
    pauses.pause("a", 10, now=0)
    assert pauses.tick(11)
    assert not pauses.tick(12)
    with pytest.raises(PauseRefused, match="pause token of operation 'a' expired"):
        pauses.resume("a")
    pauses.loaded()
    assert pauses.resume("a") is Step.NOTHING
    assert pauses.pause("b", 1, now=20) is Step.PAUSE


@pytest.mark.parametrize(("operation", "ttl_s"), [("", 10.0), ("a", 0.0)])
def test_a_pause_needs_a_name_and_a_lease(operation: str, ttl_s: float) -> None:
    with pytest.raises(PauseRefused):
        Pauses().pause(operation, ttl_s, now=0)


class AnyOrder(RuleBasedStateMachine):
    """Whatever is asked in whatever order: the engine is paused exactly while an operation holds it or has expired."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses, self.now, self.paused, self.expired = Pauses(), 0.0, False, False

    @rule(operation=st.sampled_from("abc"), ttl_s=st.floats(0.1, 5))
    def pause(self, operation: str, ttl_s: float) -> None:
        try:
            step = self.pauses.pause(operation, ttl_s, self.now)
        except PauseRefused:
            assert self.paused
            return
        self.paused |= step is Step.PAUSE

    @rule(operation=st.sampled_from("abc"))
    def resume(self, operation: str) -> None:
        try:
            step = self.pauses.resume(operation)
        except PauseRefused:
            return
        if step is Step.RESUME:
            assert self.paused
            self.paused = False

    @rule(elapsed=st.floats(0.1, 5))
    def wait(self, elapsed: float) -> None:
        self.now += elapsed
        if self.pauses.tick(self.now):
            assert self.paused
            self.paused, self.expired = False, True

    @invariant()
    def agrees(self) -> None:
        assert (self.pauses.operation_id is not None) == self.paused
        assert bool(self.pauses.expired) == self.expired


TestAnyOrder = AnyOrder.TestCase
