"""Samples of an optimizer step, one behind the other, as an EAGLE-3 head reads and predicts them.

Dims: N rows of all samples, F recorded layers side by side, D hidden size, K likeliest tokens. Row t of a sample has
the policy's hidden states at position t. At unrolled step j it reads token t + 1 + j and predicts token t + 2 + j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from miles.algorithms.device_copies import to_device
from miles.drafts.recorded_layers import EMBEDDING
from miles.drafts.recording import RecordedSample
from miles.drafts.unrolled_attention import PackedRows

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
    """Rows of samples, one sample behind the other. Which rows are learnt from is computed on the host, so that a pass
    need not ask the device."""

    rectangles: PackedRows
    """The rows by sample: its tokens but the last two."""
    positions_N: torch.Tensor
    hidden_NF: torch.Tensor
    """float32, like the embeddings."""
    learnt_rows: tuple[torch.Tensor, ...]
    """By unrolled step the rows that predict a token to learn from, int64."""
    roots: torch.Tensor
    """Rows that are learnt from at every step, int64."""
    _embeds: torch.Tensor
    """Embeddings of tokens, by sample one row more than it has: what the last rows read is there."""
    _first_embed_N: torch.Tensor
    _last_embed_N: torch.Tensor
    _target_rows: tuple[torch.Tensor, ...]
    """By unrolled step, which of the targets its learnt rows predict, int64."""
    _targets: Targets

    def embeds_ND(self, step: int) -> torch.Tensor:
        """Embeddings of what each row reads at an unrolled step; of the sample's last token but one behind its end."""
        return self._embeds[torch.minimum(self._first_embed_N + step, self._last_embed_N)]

    def targets(self, step: int) -> Targets:
        """What the policy said where the learnt rows of an unrolled step predict."""
        return self._targets[self._target_rows[step]]


def usable(sample: RecordedSample) -> bool:
    """Whether a draft can learn from a sample at all."""
    return len(sample.tokens_T) >= _FEWEST_TOKENS and bool(sample.loss_mask_R[max(2 - sample.prompt_length, 0) :].any())


def pack(samples: Sequence[RecordedSample], layers: Sequence[int], steps: int, device: torch.device) -> PackedBatch:
    """Pack `usable` samples with these recorded layers, in their order, for unrolled steps, to a device."""
    lengths = [len(sample.tokens_T) - 2 for sample in samples]
    prompts = [sample.prompt_length for sample in samples]
    responses = [len(sample.loss_mask_R) for sample in samples]
    rows_N = torch.cat([torch.arange(length) for length in lengths])
    sample_N = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    first_embed = _starts([length + 1 for length in lengths])
    last_embed = first_embed + torch.tensor(lengths)
    first_target_N = _starts(responses)[sample_N] + rows_N + 2 - torch.tensor(prompts)[sample_N]
    mask = torch.cat([sample.loss_mask_R for sample in samples])
    learnt_SN = _learnt(first_target_N, sample_N, mask, torch.tensor(responses), steps)
    learnt_rows = [learnt_N.nonzero()[:, 0] for learnt_N in learnt_SN]
    targets = (
        torch.cat([sample.top_tokens_RK for sample in samples]),
        torch.cat([sample.top_log_probs_RK for sample in samples]),
        torch.cat([sample.tokens_T[sample.prompt_length :] for sample in samples]),
    )
    hidden = [
        _joined([sample.hidden_TD[layer][:length] for sample, length in zip(samples, lengths, strict=True)], device)
        for layer in layers
    ]
    embeds = [sample.hidden_TD[EMBEDDING][: length + 1] for sample, length in zip(samples, lengths, strict=True)]
    return PackedBatch(
        rectangles=PackedRows(lengths, device),
        positions_N=to_device(rows_N, device),
        hidden_NF=torch.cat(hidden, dim=-1),
        learnt_rows=tuple(to_device(rows, device) for rows in learnt_rows),
        roots=to_device(learnt_SN.all(0).nonzero()[:, 0], device),
        _embeds=_joined(embeds, device),
        _first_embed_N=to_device(first_embed[sample_N] + rows_N + 1, device),
        _last_embed_N=to_device(last_embed[sample_N], device),
        _target_rows=tuple(to_device(first_target_N[rows] + step, device) for step, rows in enumerate(learnt_rows)),
        _targets=Targets(*(to_device(each, device) for each in targets)),
    )


def _learnt(
    first_target_N: torch.Tensor, sample_N: torch.Tensor, mask: torch.Tensor, responses: torch.Tensor, steps: int
) -> torch.Tensor:
    """Whether a row predicts a token to learn from at each unrolled step, bool [steps, N].

    `first_target_N`: index in the targets of what each row predicts at step 0, which may lie outside of its sample's.
    """
    index_SN = first_target_N + torch.arange(steps)[:, None]
    inside_SN = (index_SN >= 0) & (index_SN < len(mask))
    index_SN = index_SN.clamp(0, len(mask) - 1)
    target_sample = torch.repeat_interleave(torch.arange(len(responses)), responses)
    return inside_SN & (target_sample[index_SN] == sample_N) & mask[index_SN]


def _joined(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Rows one behind the other on the device, float32. Many megabytes: host memory is copied once, to a place from
    which the device reads by itself."""
    if device.type != "cuda" or parts[0].device.type != "cpu":
        return torch.cat(list(parts)).to(device).float()
    rows = sum(len(part) for part in parts)
    host = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True)
    torch.cat(list(parts), out=host)
    return host.to(device, non_blocking=True).float()


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    """Where each begins when they lie one behind the other, int64."""
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return ends - torch.tensor(lengths, dtype=torch.int64)
