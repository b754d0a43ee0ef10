"""What services use stays bounded: the last quarter of a soak against its second."""

from __future__ import annotations

from collections.abc import Sequence

from soak.figures import NAMES, Trend

WATCHED = ("controller", "gateway", "redis", "launcher")
GROWTH = 1.35
"""The last quarter's median may be so many times the second's ..."""
SPARE = {"memory_mb": 40.0, "rss_mb": 60.0, "files": 40.0, "threads": 16.0, "keys": 400.0}
"""... and so much more: caches fill, and jobs leave their histories."""


def growth_faults(trends: Sequence[Trend]) -> list[str]:
    """Faults of the trends of a soak."""
    return [
        f"{trend.process}: {NAMES[trend.what]} went from {trend.second_quarter:.1f} in the second quarter to "
        f"{trend.last_quarter:.1f} in the last (slope {trend.per_hour:.1f} per hour)"
        for trend in trends
        if trend.process in WATCHED and trend.last_quarter > trend.second_quarter * GROWTH + SPARE[trend.what]
    ]
