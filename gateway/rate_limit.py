"""Token-bucket rate limits: a pure rule without a clock."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RateLimit:
    """Allows `per_s` requests per second for each name, with bursts of up to `burst`."""

    def __init__(self, per_s: float, burst: int, names: int = 10_000) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._names = names
        self._buckets: collections.OrderedDict[str, _Bucket] = collections.OrderedDict()

    def take(self, name: str, now_s: float) -> float:
        """Count a request and return 0, or return the seconds to wait, in which case it is not counted."""
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._burst, now_s)
            if len(self._buckets) > self._names:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(name)
        elapsed = max(0.0, now_s - bucket.at_s)
        bucket.tokens = min(self._burst, bucket.tokens + elapsed * self._per_s)
        bucket.at_s = now_s
        if bucket.tokens >= 1.0:
            bucket.tokens -= 1.0
            return 0.0
        return (1.0 - bucket.tokens) / self._per_s
