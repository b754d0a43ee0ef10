"""Sampling: one token per row of logits, with its log-probability.

Rows are independent: every operation works along the vocabulary, and a row's only randomness is one uniform number that
is turned into a token by inverting the cumulative distribution. So a token depends only on its row of logits, its
parameters and its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from miles.services.rollout.engines.base import SamplingParams
from miles.services.rollout.engines.torch.generation.random_numbers import uniforms

_BLOCK = 256
_LIKELY = 1024
"""Candidates looked at first for top-p; a row whose nucleus is larger is sorted in full."""


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """How to sample one row's token."""

    params: SamplingParams
    token_index: int
    """Index of the token in its response, resumed tokens included; picks the random number."""
    banned: Sequence[int] = ()
    """Tokens that may not be sampled now, because the response may not end yet."""


def sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """Sample a token for each of the first len(draws) rows of `logits_RV` (any float dtype, R >= len(draws)).

    Returns the tokens and their log-probabilities in nats, by the arithmetic of `miles.algorithms.log_probs`: float32
    log-softmax of logits / temperature over the whole vocabulary, before top-k, top-p and banned tokens. Greedy rows
    (temperature 0) report it at temperature 1.
    """
    rows = len(draws)
    scaled_RV = _at_temperature(logits_RV, draws)
    log_probs_RV = torch.log_softmax(scaled_RV, dim=-1)
    greedy = [i for i, draw in enumerate(draws) if draw.params.temperature == 0]
    if len(greedy) == rows:
        tokens_R = _greedy(log_probs_RV[:rows], draws)
    else:
        weights_RV = torch.softmax(scaled_RV, dim=-1)[:rows]
        _mask_banned(weights_RV, draws)
        _restrict(weights_RV, draws)
        tokens_R = _invert(weights_RV, _numbers(draws, weights_RV.device))
        if greedy:
            tokens_R[greedy] = _greedy(log_probs_RV[greedy], [draws[i] for i in greedy])
    chosen_R = log_probs_RV[:rows].gather(1, tokens_R[:, None])[:, 0]
    return tokens_R.tolist(), chosen_R.tolist()


def likeliest(logits_RV: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """The likeliest tokens of the first len(counts) rows, as many as each count, from the likeliest on."""
    found: list[list[int]] = [[] for _ in counts]
    for count in set(counts) - {
        0
    }:  # each by itself: which of equal logits come first depends on how many are asked for
        rows = [row for row, asked in enumerate(counts) if asked == count]
        ids_RK = logits_RV[rows].topk(min(count, logits_RV.shape[1]), dim=-1).indices.tolist()
        for row, ids in zip(rows, ids_RK, strict=True):
            found[row] = ids
    return found


def _at_temperature(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    temperatures = [draw.params.temperature or 1.0 for draw in draws]
    scaled_RV = logits_RV.float()
    if all(temperature == 1.0 for temperature in temperatures):
        return scaled_RV
    temperatures += [1.0] * (logits_RV.shape[0] - len(temperatures))
    return scaled_RV / torch.tensor(temperatures, dtype=torch.float32, device=logits_RV.device)[:, None]


def _greedy(log_probs_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    if any(draw.banned for draw in draws):
        log_probs_RV = log_probs_RV.clone()
        for row, draw in enumerate(draws):
            log_probs_RV[row, list(draw.banned)] = -torch.inf
    return log_probs_RV.argmax(dim=-1)


def _mask_banned(weights_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    pairs = [(row, token) for row, draw in enumerate(draws) for token in draw.banned]
    if pairs:
        rows, tokens = torch.tensor(pairs, device=weights_RV.device).T
        weights_RV[rows, tokens] = 0.0


def _numbers(draws: Sequence[Draw], device: torch.device) -> torch.Tensor:
    seeds = np.array([draw.params.seed for draw in draws], dtype=np.uint64)
    indices = np.array([draw.token_index for draw in draws], dtype=np.uint64)
    return torch.from_numpy(uniforms(seeds, indices)).to(device)


def _restrict(weights_RV: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Zero, in place, the weights outside top-k and then outside top-p of what top-k left."""
    vocabulary = weights_RV.shape[1]
    limits = [
        (row, draw.params.top_k if 0 < draw.params.top_k < vocabulary else vocabulary, draw.params.top_p)
        for row, draw in enumerate(draws)
        if draw.params.temperature != 0 and (0 < draw.params.top_k < vocabulary or draw.params.top_p < 1.0)
    ]
    if not limits:
        return
    rows = [row for row, _, _ in limits]
    part_RV = weights_RV[rows]
    part_RV, decided = _keep_top(part_RV, limits, min(vocabulary, _LIKELY))
    left = [i for i, done in enumerate(decided) if not done]
    if left:
        part_RV[left], _ = _keep_top(part_RV[left], [limits[i] for i in left], vocabulary)
    weights_RV[rows] = part_RV


def _keep_top(
    weights_RV: torch.Tensor, limits: Sequence[tuple[int, int, float]], size: int
) -> tuple[torch.Tensor, list[bool]]:
    """Keep each row's top-k, then its nucleus, looking at its `size` likeliest tokens.

    Returns the weights and whether `size` tokens were enough to decide; other rows are returned unchanged.
    """
    device = weights_RV.device
    top_RS, ids_RS = weights_RV.topk(size, dim=-1)
    top_k_R = torch.tensor([top_k for _, top_k, _ in limits], device=device)
    top_p_R = torch.tensor([top_p for _, _, top_p in limits], dtype=torch.float64, device=device)
    rank_S = torch.arange(size, device=device)
    in_top_k_RS = rank_S[None] < top_k_R[:, None]
    ahead_RS = torch.where(in_top_k_RS, top_RS, 0.0).double().cumsum(-1)
    mass_R = torch.where(top_k_R <= size, ahead_RS[:, -1], weights_RV.double().sum(-1))
    nucleus_R = top_p_R * mass_R
    before_RS = torch.nn.functional.pad(ahead_RS, (1, 0))[:, :-1]
    keep_RS = in_top_k_RS & ((before_RS < nucleus_R[:, None]) | (top_p_R >= 1.0)[:, None])
    keep_RS[:, 0] = True
    whole_nucleus_R = (top_k_R == weights_RV.shape[1]) & (top_p_R < 1.0) & (ahead_RS[:, -1] >= nucleus_R)
    enough_R = (top_k_R <= size) | whole_nucleus_R
    kept_RV = torch.zeros_like(weights_RV).scatter_(1, ids_RS, torch.where(keep_RS, top_RS, 0.0))
    return torch.where(enough_R[:, None], kept_RV, weights_RV), enough_R.tolist()


def _invert(weights_RV: torch.Tensor, numbers_R: torch.Tensor) -> torch.Tensor:
    """Invert each row's cumulative distribution at its number, first over blocks of the vocabulary, then within one.

    `weights_RV` (float32, not negative, at least one positive) need not add up to 1; weight 0 is never sampled.
    """
    missing = -weights_RV.shape[1] % _BLOCK
    if missing:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, missing))
    blocks_RNB = weights_RV.view(weights_RV.shape[0], -1, _BLOCK)
    block_R, fraction_R = _pick(blocks_RNB.sum(-1).double(), numbers_R)
    rows_R = torch.arange(blocks_RNB.shape[0], device=weights_RV.device)
    inside_R, _ = _pick(blocks_RNB[rows_R, block_R].double(), fraction_R)
    return block_R * _BLOCK + inside_R


def _pick(weights_RN: torch.Tensor, numbers_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry of each row on which its number falls, and how far into the entry it falls, in [0, 1)."""
    cumulative_RN = weights_RN.cumsum(-1)
    total_R = cumulative_RN[:, -1]
    target_R = torch.minimum(numbers_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    entry_R = (cumulative_RN <= target_R[:, None]).sum(-1)
    weight_R = weights_RN.gather(1, entry_R[:, None])[:, 0]
    start_R = cumulative_RN.gather(1, entry_R[:, None])[:, 0] - weight_R
    return entry_R, ((target_R - start_R) / weight_R).clamp(0.0, 1.0 - 2.0**-53)
