"""Jobs on a stack while its services are killed at random moments."""

from __future__ import annotations

from typing import Any

import pytest
from chaos_stack import BATCH, Ended, Stack

from miles.launcher.drill.drill import Recovery

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"max_weight_staleness": 2, "partial_rollout": True},
    {"max_weight_staleness": 1, "over_sampling_batch_size": BATCH + 2, "pause_generation_mode": "retract"},
)
"""Synchronous, and two kinds of asynchronous jobs."""
RECOVERIES = pytest.StashKey[list[list[Recovery]]]()
"""The recoveries of each kill schedule."""


async def run_schedules(stack: Stack, seeds: range, config: pytest.Config) -> None:
    """A job for each seed, of one mode after the other; a synchronous one must end with the weights of an untouched."""
    untouched = await stack.run("untouched")
    untouched.assert_every_group_was_trained_once()
    for seed in seeds:
        mode = MODES[seed % len(MODES)]
        ended = await _run_with_kills(stack, seed, mode, untouched.seconds / 3)
        config.stash[RECOVERIES].append(ended.recoveries)
        try:
            ended.assert_every_group_was_trained_once()
            if not mode:
                ended.assert_same_weights(untouched)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed} in {ended.run_dir}: {error}") from error


async def _run_with_kills(stack: Stack, seed: int, mode: dict[str, Any], mean_pause_s: float) -> Ended:
    """A job in which at least one service was killed: again with shorter pauses while the first kill comes too late."""
    while True:
        ended = await stack.run_through(seed, mean_pause_s, f"seed-{seed}-pause-{mean_pause_s:.3f}", **mode)
        if ended.kills:
            return ended
        mean_pause_s /= 2
