"""Where SGLang can change the steps of its drafts while a server runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.config.speculation import DraftKind, Speculation

_ADAPTIVE = (DraftKind.MTP, DraftKind.EAGLE, DraftKind.EAGLE3)
_BESIDE = {
    "enable_dp_attention": "its ranks would not decide alike",
    "enable_multi_layer_eagle": "its worker has no such thing",
    "enable_two_batch_overlap": "it would lose its attention backend",
    "enable_pdmux": "it would keep the attention backends of before",
}
"""Flags beside which SGLang turns adaptive steps off (`adaptive_unsupported_reason`)."""


def why_not_adaptive(drafts: Speculation, flags: Mapping[str, Any]) -> str | None:
    """Why SGLang cannot change the steps while a server with these flags runs; None when it can."""
    if drafts.kind not in _ADAPTIVE:
        return f"SGLang cannot change the steps of {drafts.kind.name} while it runs"
    if drafts.topk != 1:
        return f"SGLang adapts the steps of one branch, and speculative_eagle_topk is {drafts.topk}"
    for flag, reason in _BESIDE.items():
        if flags.get(flag):
            return f"SGLang does not adapt steps with {flag}: {reason}"
    return None
