"""Samples of an optimizer step, one behind the other, as an EAGLE-3 head reads and predicts them.

Dims: N rows of all samples, F recorded layers side by side, D hidden size, K likeliest tokens. Row t of a sample has
the policy's hidden states at position t. At unrolled step j it reads token t + 1 + j and predicts token t + 2 + j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from miles.drafts.recorded_layers import EMBEDDING
from miles.drafts.recording import RecordedSample

_FEWEST_TOKENS = 3
"""Fewer leave no row with something to read and something to predict."""


@dataclasses.dataclass(frozen=True, slots=True)
class Targets:
    """What the policy said about the tokens that N rows predict."""

    top_tokens_NK: torch.Tensor
    top_log_probs_NK: torch.Tensor
    sampled_N: torch.Tensor
    """The tokens that followed, int64."""

    def __getitem__(self, rows: torch.Tensor | slice) -> Targets:
        return Targets(self.top_tokens_NK[rows], self.top_log_probs_NK[rows], self.sampled_N[rows])


@dataclasses.dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of samples, one sample behind the other."""

    lengths: tuple[int, ...]
    """Rows of each sample: its tokens but the last two."""
    positions_N: torch.Tensor
    hidden_NF: torch.Tensor
    """float32, like the embeddings."""
    _embeds: torch.Tensor
    """Embeddings of tokens, by sample one row more than it has: what the last rows read is there."""
    _first_embed_N: torch.Tensor
    _last_embed_N: torch.Tensor
    _first_target_N: torch.Tensor
    """Index in the targets of what each row predicts at step 0, which may lie outside of the sample's."""
    _targets: Targets
    _target_sample: torch.Tensor
    _sample_N: torch.Tensor
    _learnt: torch.Tensor
    """Targets that the draft learns from, bool."""

    def embeds_ND(self, step: int) -> torch.Tensor:
        """Embeddings of what each row reads at an unrolled step; of the sample's last token but one behind its end."""
        return self._embeds[torch.minimum(self._first_embed_N + step, self._last_embed_N)]

    def learnt_rows(self, step: int) -> torch.Tensor:
        """Rows that predict a token to learn from at an unrolled step, int64."""
        index_N = self._first_target_N + step
        inside_N = (index_N >= 0) & (index_N < len(self._learnt))
        index_N = index_N.clamp(0, len(self._learnt) - 1)
        inside_N &= self._target_sample[index_N] == self._sample_N
        return (inside_N & self._learnt[index_N]).nonzero()[:, 0]

    def targets(self, step: int, rows: torch.Tensor) -> Targets:
        """What the policy said where these rows, which are learnt, predict at an unrolled step."""
        return self._targets[self._first_target_N[rows] + step]


def usable(sample: RecordedSample) -> bool:
    """Whether a draft can learn from a sample at all."""
    return len(sample.tokens_T) >= _FEWEST_TOKENS and bool(sample.loss_mask_R[max(2 - sample.prompt_length, 0) :].any())


def pack(samples: Sequence[RecordedSample], layers: Sequence[int], device: torch.device) -> PackedBatch:
    """Pack `usable` samples with these recorded layers, in their order, to a device."""
    lengths = [len(sample.tokens_T) - 2 for sample in samples]
    prompts = [sample.prompt_length for sample in samples]
    responses = [len(sample.loss_mask_R) for sample in samples]
    rows_N = torch.cat([torch.arange(length) for length in lengths])
    sample_N = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    first_embed = _starts([length + 1 for length in lengths])
    first_target = _starts(responses)
    targets = Targets(
        torch.cat([sample.top_tokens_RK for sample in samples]),
        torch.cat([sample.top_log_probs_RK for sample in samples]),
        torch.cat([sample.tokens_T[sample.prompt_length :] for sample in samples]),
    )
    hidden = [
        torch.cat([sample.hidden_TD[layer][:length] for layer in layers], dim=-1)
        for sample, length in zip(samples, lengths, strict=True)
    ]
    embeds = [sample.hidden_TD[EMBEDDING][: length + 1] for sample, length in zip(samples, lengths, strict=True)]
    last_embed = first_embed + torch.tensor(lengths)
    return PackedBatch(
        tuple(lengths),
        rows_N.to(device),
        torch.cat(hidden).to(device).float(),
        torch.cat(embeds).to(device).float(),
        (first_embed[sample_N] + rows_N + 1).to(device),
        last_embed[sample_N].to(device),
        (first_target[sample_N] + rows_N + 2 - torch.tensor(prompts)[sample_N]).to(device),
        Targets(*(each.to(device) for each in (targets.top_tokens_NK, targets.top_log_probs_NK, targets.sampled_N))),
        torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(responses)).to(device),
        sample_N.to(device),
        torch.cat([sample.loss_mask_R for sample in samples]).to(device),
    )


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    """Where each begins when they lie one behind the other, int64."""
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return ends - torch.tensor(lengths, dtype=torch.int64)
