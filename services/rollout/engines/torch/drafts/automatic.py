"""Automatic speculation: whether drafts pay, and how many steps of them, by what steps have measured.

For each size of batch it holds a decision, drafts or none. Now and then it takes a few steps the other way, a probe,
and compares their seconds with those of the steps just before. A decision that a probe confirms is probed half as often
the next time. Pure: no clock, no random numbers, no thread.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence

from miles.services.rollout.engines.torch.drafts.acceptance import Acceptance

INTERVAL = 16
"""Lengths of a probe from one to the next, at first and after a decision has changed."""
LONGEST_INTERVAL = 16 * INTERVAL
"""The same where probes have confirmed the decision again and again."""
OFF_BELOW, ON_ABOVE = 0.98, 1.04
"""Speedups at which drafts are turned off and on; apart, so that noise does not turn them back and forth."""
_STEPS_GAIN = 1.02
"""Speedup over the present one from which another number of steps is taken."""
_OUTLIER = 3.0
"""Times the median from which a step's seconds are those of a disturbance."""
_SIMILAR = 1.25
"""Batch sizes differ by less than this in steps that are compared."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One step in which requests decoded, and nothing else was computed."""

    steps: int
    """Most drafts that a request could have; 0: there were none to be."""
    seconds: float
    """Of drafting, the forward pass and sampling."""
    proposed: Sequence[int]
    """Drafts of each request."""
    accepted: Sequence[int]
    """Those that were accepted."""

    @property
    def requests(self) -> int:
        """Requests that decoded."""
        return len(self.proposed)


class _Bucket:
    """The decision for batches of similar sizes."""

    def __init__(self, requests: int, on: bool, steps: int) -> None:
        self.on = on
        self.steps = steps
        """Drafts of a request in one step while they are on."""
        self.probe_length = max(8, 32 // requests)
        self.interval = 1
        self.left = self.probe_length
        """Steps until the next probe."""
        self.probing = False
        self.warming = True
        """The next step is the first of its way, which has to make up for something."""
        self.speedup = 0.0
        """The last estimates of tokens/s with drafts over those without; 0 before the first."""
        self.usual: deque[Measured] = deque(maxlen=self.probe_length)
        self.probe: list[Measured] = []

    def restart(self, left: int) -> None:
        self.probing, self.left, self.warming = False, left, True
        self.usual.clear()
        self.probe.clear()


class Automatic:
    """Decides how many steps are drafted, up to a bound."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._buckets: dict[int, _Bucket] = {}
        self._acceptance = Acceptance()
        self._latest = (1, self._bucket(1))
        """The latest batch size and its bucket; other threads read no more than these."""

    def steps(self, requests: int) -> int:
        """Drafts that each of so many decoding requests may have in the next step; 0: none."""
        bucket = self._bucket(requests)
        if bucket.probing:
            return 0 if bucket.on else self._max_steps
        return bucket.steps if bucket.on else 0

    def note(self, step: Measured) -> None:
        """Take what a step has measured."""
        if not step.requests:
            return
        bucket = self._bucket(step.requests)
        self._latest = (step.requests, bucket)
        if step.steps:
            self._acceptance.note(step.requests, step.proposed, step.accepted)
        if (step.steps > 0) != (bucket.on != bucket.probing):
            return  # the decision has changed since
        if bucket.warming:
            bucket.warming = False
            return
        if any(
            not 1 / _SIMILAR < step.requests / other.requests < _SIMILAR for other in (*bucket.usual, *bucket.probe)
        ):
            bucket.restart(bucket.probe_length if bucket.probing else bucket.left)
            return
        if bucket.probing:
            bucket.probe.append(step)
            if len(bucket.probe) == bucket.probe_length:
                self._judge(bucket)
            return
        bucket.usual.append(step)
        bucket.left -= 1
        if bucket.left <= 0 and len(bucket.usual) == bucket.probe_length:
            bucket.probing = bucket.warming = True
            if not bucket.on:
                self._acceptance.forget()

    def versions_changed(self) -> None:
        """The policy or the draft has other weights: what was measured may not hold any more."""
        for bucket in self._buckets.values():
            bucket.interval, bucket.speedup = INTERVAL, 0.0
            bucket.left = min(bucket.left, INTERVAL * bucket.probe_length)

    @property
    def decided_steps(self) -> int:
        """Steps at the latest batch size; 0 while drafts are off."""
        _, bucket = self._latest
        return bucket.steps if bucket.on else 0

    @property
    def speedup(self) -> float:
        """Tokens per second with drafts over those without, at the latest batch size; 0 when not known."""
        _, bucket = self._latest
        return bucket.speedup

    @property
    def reason(self) -> str:
        """Why drafts are off or cut short at the latest batch size; empty when they are not."""
        batch, bucket = self._latest
        least = 1 << _size(batch) >> 1
        requests = f"{batch} request{'s' * (batch > 1)}" if batch < 3 else f"{least + 1} to {2 * least} requests"
        measured = f" ({bucket.speedup:.2f} times the tokens/s without)" if bucket.speedup else ""
        if not bucket.on:
            return f"drafts do not pay with {requests} at once{measured}"
        if bucket.steps < self._max_steps:
            return f"more than {bucket.steps} steps do not pay with {requests} at once{measured}"
        return ""

    def _bucket(self, requests: int) -> _Bucket:
        size = _size(requests)
        bucket = self._buckets.get(size)
        if bucket is None:
            on, steps = True, self._max_steps
            if self._buckets:
                nearest = self._buckets[min(self._buckets, key=lambda other: (abs(other - size), other))]
                on, steps = nearest.on, nearest.steps
            bucket = self._buckets[size] = _Bucket(requests, on, steps)
        return bucket

    def _judge(self, bucket: _Bucket) -> None:
        """Compare a probe with the steps before it, and decide."""
        drafted, plain = (bucket.usual, bucket.probe) if bucket.on else (bucket.probe, bucket.usual)
        slower = _seconds(drafted) / _seconds(plain)
        tried = drafted[0].steps
        drafts = sum(sum(step.proposed) for step in drafted) / sum(step.requests for step in drafted)
        cost = max(0.0, slower - 1) / drafts if drafts else 0.0
        speedup = self._acceptance.tokens(tried) / slower
        best = self._acceptance.best_steps(self._max_steps, cost)
        if best < tried and drafts:
            speedup = max(speedup, self._acceptance.speedup(best, cost))  # fewer steps will show whether it is so
        bucket.speedup = math.sqrt(bucket.speedup * speedup) if bucket.speedup else speedup
        was_on = bucket.on
        bucket.on = bucket.speedup >= OFF_BELOW if was_on else bucket.speedup > ON_ABOVE
        changed = bucket.on != was_on
        if bucket.on:
            changed |= self._adapt(bucket, tried, best, cost)
        bucket.interval = INTERVAL if changed else min(LONGEST_INTERVAL, max(INTERVAL, 2 * bucket.interval))
        bucket.restart(bucket.interval * bucket.probe_length)

    def _adapt(self, bucket: _Bucket, tried: int, best: int, cost: float) -> bool:
        """Take fewer steps at once, more by one at a time, as only their seconds are known; return whether it did."""
        gain = self._acceptance.speedup(best, cost) / self._acceptance.speedup(tried, cost)
        before = bucket.steps
        bucket.steps = tried
        if gain >= _STEPS_GAIN:
            bucket.steps = best if best < tried else tried + 1
        return bucket.steps != before


def _size(requests: int) -> int:
    """Batches of 1, 2, 3 to 4, 5 to 8, ... requests count as similar."""
    return (max(requests, 1) - 1).bit_length()


def _seconds(steps: Sequence[Measured]) -> float:
    """Mean seconds of a step, without disturbances, at about a batch of one; which is fair to both batch sizes when
    seconds grow with the batch between not at all and in proportion."""
    seconds = [step.seconds / math.sqrt(step.requests) for step in steps]
    median = statistics.median(seconds)
    return max(statistics.fmean(s for s in seconds if s <= _OUTLIER * median), 1e-9)
