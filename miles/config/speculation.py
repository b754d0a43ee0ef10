"""What engines draft with: SGLang's flags of speculative decoding, read once for every engine and service."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


class DraftKind(enum.Enum):
    """Where drafts come from."""

    NONE = "none"
    MTP = "mtp"
    """The policy's own MTP layers, whose weights come with the policy's versions."""
    EAGLE3 = "eagle3"
    """A head of few layers that reads the policy's hidden states; has weights of its own."""
    EAGLE = "eagle"
    """The older head, which reads the last hidden state alone; has weights of its own."""
    STANDALONE = "standalone"
    """A small language model with the policy's tokens; has weights of its own."""
    NGRAM = "ngram"
    """Earlier responses, and the response so far; there is no model."""
    OTHER = "other"
    """An algorithm of SGLang's that nothing here looks into."""


@dataclasses.dataclass(frozen=True, slots=True)
class Speculation:
    """How an engine drafts and verifies."""

    kind: DraftKind
    draft_model_path: str | None = None
    """Folder of the draft model; None for kinds without weights of their own, and for an EAGLE-3 head that begins from
    nothing."""
    num_steps: int = 0
    """Most tokens that are drafted one behind the other."""
    topk: int = 1
    """Branches of the tree of drafts at each step."""
    num_draft_tokens: int = 0
    """Tokens that a verification computes: drafts and the last token of the response."""
    adaptive: bool | None = None
    """Whether steps follow what is accepted, within num_steps; None: the engine decides."""

    @property
    def is_on(self) -> bool:
        """Whether there are drafts at all."""
        return self.kind is not DraftKind.NONE

    @property
    def has_weights(self) -> bool:
        """Whether the draft has weights of its own, which the draft stream brings."""
        return self.kind in (DraftKind.EAGLE3, DraftKind.EAGLE, DraftKind.STANDALONE)


DEFAULT_STEPS = 3
"""Steps where none are given; with one branch, one token more is verified."""

_KINDS = {
    "EAGLE3": DraftKind.EAGLE3,
    "STANDALONE": DraftKind.STANDALONE,
    "NGRAM": DraftKind.NGRAM,
    "NEXTN": DraftKind.MTP,
}


def speculation_of(flags: Mapping[str, Any]) -> Speculation:
    """Read SGLang's flags, under its names without the prefix `sglang_`."""
    algorithm = str(flags.get("speculative_algorithm") or "").upper()
    path = flags.get("speculative_draft_model_path")
    if algorithm in ("", "NONE"):
        return Speculation(DraftKind.NONE)
    if algorithm == "EAGLE":
        kind = DraftKind.MTP if path is None else DraftKind.EAGLE
    else:
        kind = _KINDS.get(algorithm, DraftKind.OTHER)
    tokens = _count(flags.get("speculative_num_draft_tokens"))
    steps = _count(flags.get("speculative_num_steps"))
    if steps is None:
        steps = DEFAULT_STEPS if tokens is None else tokens - 1
    adaptive = flags.get("speculative_adaptive")
    return Speculation(
        kind=kind,
        draft_model_path=None if path is None or kind is DraftKind.MTP else str(path),
        num_steps=steps,
        topk=_count(flags.get("speculative_eagle_topk")) or 1,
        num_draft_tokens=steps + 1 if tokens is None else tokens,
        adaptive=None if adaptive is None else bool(adaptive),
    )


def _count(value: object) -> int | None:
    """A whole number, also as text; None for anything else, which rules refuse."""
    text = str(value)
    return int(text) if text.isdecimal() else None
