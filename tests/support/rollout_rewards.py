"""Rewards for the rollout service's tests, served as a script; the label says what to do."""

from __future__ import annotations

import asyncio
import math

from miles.reward_sdk import Scored, reward, serve
from miles.types import Sample


@reward
async def by_label(sample: Sample) -> object:
    """Do what the sample's label says."""
    if sample.label == "nan":
        return math.nan
    if sample.label == "nan for the first" and sample.index == 0:
        return math.nan
    if sample.label == "parts":
        return {"a": 1.0, "b": float(sample.index)}
    if sample.label == "slow":
        await asyncio.sleep(0.5)
    if sample.label == "same":
        return 0.5
    return Scored(float(sample.index), {"scored": sample.response_length})


@reward(group=True)
def ranked(samples: list[Sample]) -> list[float]:
    """Highest for the longest text."""
    order = sorted(samples, key=lambda sample: (len(sample.response), sample.index))
    return [float(order.index(sample)) for sample in samples]


serve(port=0)
