"""Which order brings an engine one step closer to the target version."""

from __future__ import annotations

from miles.services.weightsync.activation import Activation
from miles.services.weightsync.engine import Engine, OrderKind
from miles.services.weightsync.timing import Now


def next_order(
    engine: Engine, target: int | None, activation: Activation | None, now: Now
) -> tuple[OrderKind, int] | None:
    """The next order of an idle engine and its publication; None while it has nothing to do."""
    if engine.session is None or engine.in_flight is not None:
        return None
    if engine.quarantined and now.monotonic_s < engine.retry_at_s:
        return None
    if target is not None and (engine.refused == target or (target in engine.out_of_reach and engine.held != target)):
        return None
    if target is not None and engine.held != target:
        if engine.verified != target:
            return OrderKind.PREFETCH, target
        return (OrderKind.SWAP, target) if activation is None or activation.swapping else None
    if engine.quarantined:
        return None
    if activation is not None:
        if activation.swapping and not activation.complete(engine):
            return OrderKind.CHECK, activation.publication_id
        return None
    unwanted = [publication_id for publication_id in engine.maps if publication_id != engine.held]
    return (OrderKind.DISCARD, min(unwanted)) if unwanted else None
