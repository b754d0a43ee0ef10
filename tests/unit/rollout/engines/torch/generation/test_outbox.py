"""When the event loop is told of new tokens."""

from __future__ import annotations

from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationResult
from miles.services.rollout.engines.torch.generation.outbox import INTERVAL_S, Outbox

END = GenerationResult(FinishReason.STOP, ())


def test_tokens_wait_for_the_interval_and_come_together() -> None:
    box = Outbox()
    assert box.take(0.0) == []
    assert not box.due(99.0)
    box.token("a", 1, -0.1)
    box.token("b", 2, -0.2)
    box.token("a", 3, -0.3)
    assert not box.due(INTERVAL_S / 2)
    assert box.due(INTERVAL_S)
    assert box.take(11.0) == [("a", GenerationDelta([1, 3], [-0.1, -0.3])), ("b", GenerationDelta([2], [-0.2]))]
    assert not box.due(99.0)


def test_an_end_is_due_at_once_and_carries_the_tokens_before_it() -> None:
    box = Outbox()
    box.take(10.0)
    box.token("a", 1, -0.1)
    box.end("a", END)
    assert box.due(10.0)
    assert box.take(10.0) == [("a", GenerationDelta([1], [-0.1], END))]


def test_a_failure_is_due_at_once_and_replaces_the_tokens() -> None:
    box = Outbox()
    box.take(10.0)
    error = FloatingPointError("no numbers")
    box.token("a", 1, -0.1)
    box.fail("a", error)
    assert box.due(10.0)
    assert box.take(10.0) == [("a", error)]
