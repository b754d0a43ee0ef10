"""Discounted sums from each token to the end of its sample."""

from __future__ import annotations

import torch

from miles.algorithms.packing import Packing


def discounted_suffix_sums(x_T: torch.Tensor, packing: Packing, discount: float) -> torch.Tensor:
    """S_t = x_t + discount * S_(t+1) within each sample, S = 0 after its last token.

    All tokens advance together by doubling: after step k, S_t covers the 2^k tokens from t on, so a sample of n tokens
    takes log2(n) steps rather than n.

    Returns:
        float64 [T].
    """
    sums_BT = packing.unpack(x_T.double())
    length = sums_BT.shape[1]
    reach, factor = 1, discount
    while reach < length and factor != 0.0:
        tail_BT = sums_BT[:, reach:] * factor
        sums_BT = torch.cat([sums_BT[:, :-reach] + tail_BT, sums_BT[:, -reach:]], dim=1)
        reach, factor = reach * 2, factor * factor
    return packing.pack(sums_BT)
