"""The endless order of prompts over epochs."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt


class PromptOrder:
    """Maps group ids to prompts: group g is prompt `permutation(g // n)[g % n]` of n.

    The order depends only on (n, seed, shuffle), so a position in it is one integer.
    """

    def __init__(self, num_prompts: int, *, seed: int = 0, shuffle: bool = False) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts = {num_prompts}; an order needs at least one prompt")
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle

    def epoch(self, group_id: int) -> int:
        """Return the number of complete passes over the prompts before this group."""
        if group_id < 0:
            raise ValueError(f"group_id = {group_id}; group ids count from 0")
        return group_id // self.num_prompts

    def index(self, group_id: int) -> int:
        """Return the index of this group's prompt in the prompt set."""
        epoch, position = self.epoch(group_id), group_id % self.num_prompts
        return int(permutation(self.num_prompts, self.seed, epoch)[position]) if self.shuffle else position

    def num_groups(self, num_epoch: int) -> int:
        """Return the groups in `num_epoch` passes; num_rollout is that // rollout_batch_size."""
        return num_epoch * self.num_prompts


@functools.lru_cache(maxsize=8)
def permutation(num_prompts: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of one epoch; int64, shape (num_prompts,), read-only.

    Sorts raw 64-bit outputs of PCG64, which are the same in all versions of numpy, unlike `Generator.permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed % 2**64, epoch)))
    order = np.argsort(bits.random_raw(num_prompts), kind="stable")
    order.setflags(write=False)
    return order
