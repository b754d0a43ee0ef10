"""Weight updates from the trainer to the engines: manifests, transports, publisher and subscriber.

It never decides which version is active; that is the weightsync service's job. Start at `base` (the contract of
transports), then `publisher` (the trainer's side) and `subscriber` (the engine's side).

`miles.weights.manifest` needs no torch, so that the weightsync service runs without it; the names below are imported
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.weights.publisher import PublishResult, WeightPublisher
    from miles.weights.subscriber import SubscriberState, WeightSubscriber

__all__ = ["PublishResult", "SubscriberState", "WeightPublisher", "WeightSubscriber"]

_MODULE_OF = {
    "PublishResult": "miles.weights.publisher",
    "SubscriberState": "miles.weights.subscriber",
    "WeightPublisher": "miles.weights.publisher",
    "WeightSubscriber": "miles.weights.subscriber",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module at first use."""
    import importlib

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
