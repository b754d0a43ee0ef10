"""Decides the number types of a run where its configuration has `auto`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

AUTO = "auto"
KEPT_WITHIN = 1.5
"""A resumed run keeps its type unless the other one is faster by more than this factor."""
SLOW = 1.25
"""Factor above which a worker counts as slow in the chosen type."""
_ENGINE_TYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, slots=True)
class NumberTypes:
    """The number types of trainer and engines of a run, and the reason."""

    train_dtype: str
    rollout_dtype: str
    reason: str
    """Empty when the configuration has both."""

    def __str__(self) -> str:
        types = f"the trainer computes in {self.train_dtype}, engines in {self.rollout_dtype}"
        return f"{types}: {self.reason}" if self.reason else types


def decide(
    train_dtype: str, rollout_dtype: str, slowdowns: Mapping[str, float | None], before: str | None = None
) -> NumberTypes:
    """Decide types that are `auto`: the type of the other side if given, else the one in which all workers are fast.

    Trainer and engines compute the same log-probabilities only in the same type, so `auto` follows a given type. Only
    the trainer supports float16.

    Args:
        train_dtype: "auto", "float32", "bfloat16" or "float16".
        rollout_dtype: "auto", "float32" or "bfloat16".
        slowdowns: By worker, the time of a bfloat16 product over that of a float32 one; None for a worker that
            is not timed, because it has bfloat16 units or runs elsewhere.
        before: The engines' type before the run was interrupted.
    """
    if AUTO not in (train_dtype, rollout_dtype):
        return NumberTypes(train_dtype, rollout_dtype, "")
    if train_dtype == AUTO and rollout_dtype != AUTO:
        return NumberTypes(rollout_dtype, rollout_dtype, "the trainer follows rollout_dtype")
    if train_dtype in _ENGINE_TYPES:
        return NumberTypes(train_dtype, train_dtype, "engines follow train_dtype")
    chosen, reason = _fastest(slowdowns, before)
    return NumberTypes(chosen if train_dtype == AUTO else train_dtype, chosen, reason)


def slow_type(worker: str, dtype: str, slowdown: float | None) -> str | None:
    """Return a warning that a type is slow on a worker, with factor and remedy; None when it is not slow."""
    if slowdown is None or slowdown <= SLOW:
        return None
    return (
        f"{worker} is slow in {dtype}: a matrix product takes {slowdown:.3g} times as long as in float32; set "
        "train_dtype and rollout_dtype to auto or float32"
    )


def slowdown_key(dtype: str) -> str:
    """Return the key under which a worker registers the time of a product in this type over that in float32."""
    return f"{dtype}_slowdown"


def _fastest(slowdowns: Mapping[str, float | None], before: str | None) -> tuple[str, str]:
    timed = {worker: slowdown for worker, slowdown in slowdowns.items() if slowdown is not None}
    if not timed:
        return "bfloat16", "every worker has units for it"
    worker, slowdown = max(timed.items(), key=lambda item: item[1])
    bound = {"bfloat16": KEPT_WITHIN, "float32": 1 / KEPT_WITHIN}.get(before or "", 1.0)
    reason = f"a bfloat16 matrix product takes {slowdown:.3g} times as long as a float32 one on {worker}"
    return ("bfloat16" if slowdown <= bound else "float32"), reason
