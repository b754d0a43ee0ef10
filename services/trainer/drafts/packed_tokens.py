"""Samples of an optimizer step, one behind the other, as a small language model reads and predicts them.

Dims: T tokens that are read, N predicted tokens, M verifications, S drafts of each, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from miles.algorithms.device_copies import to_device
from miles.drafts.packed_batch import Targets
from miles.drafts.recording import RecordedSample
from miles.services.trainer.batch.packing import Segment


@dataclasses.dataclass(frozen=True, slots=True)
class PackedTokens:
    """Everything is computed on the host and copied to the device once, which is never asked for anything."""

    segments: tuple[Segment, ...]
    """Rows of each sample: its tokens but the last, which predicts nothing."""
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    rows_N: torch.Tensor
    """Which of the T predict a token to learn from, int64."""
    targets: Targets
    """What the policy said there."""
    roots_MS: torch.Tensor
    """Which of the N the drafts of a verification would be, int64: it begins wherever S tokens to learn from follow."""


def pack_tokens(samples: Sequence[RecordedSample], steps: int, device: torch.device) -> PackedTokens:
    """Pack samples with a prompt and a token to learn from; S is `steps`."""
    lengths = [len(sample.tokens_T) - 1 for sample in samples]
    bounds = list(itertools.accumulate(lengths, initial=0))
    masks = [sample.loss_mask_R for sample in samples]
    first_rows = [start + sample.prompt_length - 1 for sample, start in zip(samples, bounds, strict=False)]
    rows = [first + mask.nonzero()[:, 0] for first, mask in zip(first_rows, masks, strict=True)]
    sample_N = torch.repeat_interleave(torch.tensor([len(each) for each in rows]))
    rows_N = torch.cat(rows)
    targets = (
        torch.cat([sample.top_tokens_RK[mask] for sample, mask in zip(samples, masks, strict=True)]),
        torch.cat([sample.top_log_probs_RK[mask] for sample, mask in zip(samples, masks, strict=True)]),
        torch.cat([sample.tokens_T[sample.prompt_length :][mask] for sample, mask in zip(samples, masks, strict=True)]),
    )
    return PackedTokens(
        tuple(Segment(start, end) for start, end in itertools.pairwise(bounds)),
        to_device(torch.cat([sample.tokens_T[:-1] for sample in samples]), device),
        to_device(torch.cat([torch.arange(length) for length in lengths]), device),
        to_device(rows_N, device),
        Targets(*(to_device(each, device) for each in targets)),
        to_device(_roots(rows_N, sample_N, steps), device),
    )


def _roots(rows_N: torch.Tensor, sample_N: torch.Tensor, steps: int) -> torch.Tensor:
    """Runs of `steps` rows one behind the other in the same sample, as indices in N, int64 [M, S]."""
    runs_MS = torch.arange(max(len(rows_N) - steps + 1, 0))[:, None] + torch.arange(steps)
    first_M, last_M = runs_MS[:, 0], runs_MS[:, -1]
    unbroken_M = (rows_N[last_M] - rows_N[first_M] == steps - 1) & (sample_N[last_M] == sample_N[first_M])
    return runs_MS[unbroken_M]
