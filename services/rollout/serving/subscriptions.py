"""Subscriptions to the versions of the policy and of the draft model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from miles.rpc.gen import policy_pb2
from miles.services.rollout.engines.base import RolloutEngine
from miles.services.rollout.serving.readiness import Serving

if TYPE_CHECKING:
    from miles.weights.adapters.merging import AdapterBase
    from miles.weights.engine_weights import WeightTarget
    from miles.weights.subscriber import SubscriberState, WeightSubscriber

log = logging.getLogger(__name__)


async def subscribe_policy(
    address: str, job_id: str, worker_id: str, engine: RolloutEngine, serving: Serving, base: AdapterBase | None
) -> WeightSubscriber:
    """Keep the engine at the policy version that the weight-sync service wants; `close` what is returned.

    `base`: the weights that published adapters are merged into; None when full weights are published.
    """
    from miles.weights.subscriber import SubscriberState, WeightSubscriber

    def on_change(state: SubscriberState) -> None:
        if state is SubscriberState.QUARANTINED:
            serving.quarantine(f"weights: {subscriber.last_error}", refused=subscriber.refused)
        elif subscriber.version is not None:
            serving.serve(subscriber.version)

    subscriber = WeightSubscriber(
        *(address, job_id, worker_id, policy_pb2.WEIGHT_STREAM_POLICY, serving),
        on_change=on_change,
        create_receiver=engine.create_receiver,
        base=base,
    )
    await subscriber.start()
    return subscriber


async def subscribe_draft(address: str, job_id: str, worker_id: str, draft: WeightTarget) -> WeightSubscriber:
    """Keep the draft model at its own version; `close` what is returned.

    The draft affects only the speed of generation, so a wrong one is logged and no gate waits for it.
    """
    from miles.weights.subscriber import SubscriberState, WeightSubscriber

    def on_change(state: SubscriberState) -> None:
        if state is SubscriberState.QUARANTINED:
            log.warning("job %s: the draft model could not be updated: %s", job_id, subscriber.last_error)

    subscriber = WeightSubscriber(
        *(address, job_id, worker_id, policy_pb2.WEIGHT_STREAM_DRAFT, draft), on_change=on_change
    )
    await subscriber.start()
    return subscriber
