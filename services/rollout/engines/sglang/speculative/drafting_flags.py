"""What a server is told about its drafts beside the flags that a job gives. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.config.speculation import DraftKind, Speculation

_STEPPED = (DraftKind.MTP, DraftKind.EAGLE, DraftKind.EAGLE3, DraftKind.STANDALONE)
"""Kinds whose model drafts one token after the other."""
NGRAM_DRAFT_TOKENS = 12
"""What SGLang verifies with NGRAM unless told otherwise."""
VERIFIED_AT_ONCE = 1024
"""Tokens that all requests together may have verified in a step, for each of which a verification holds several rows as
long as the vocabulary: some 4 GB for 150,000 tokens."""
CORPUS_TOKENS = 1 << 19
"""Tokens of earlier responses that a server searches; some hundred bytes of host memory each."""


def drafting_flags(drafts: Speculation, given: Mapping[str, Any], *, responses: bool) -> dict[str, Any]:
    """SGLang's flags that follow from those given, by name.

    Args:
        drafts: What `given` says.
        given: SGLang's flags of the job.
        responses: Whether earlier responses to a prompt come with its requests.

    Left alone SGLang takes trees of 4 branches for some families and chains for others, while the draft is trained for
    what the settings say.
    """
    added: dict[str, Any] = {}
    if drafts.kind in _STEPPED:
        added = {
            "speculative_num_steps": drafts.num_steps,
            "speculative_eagle_topk": drafts.topk,
            "speculative_num_draft_tokens": drafts.num_draft_tokens,
        }
    elif drafts.kind is DraftKind.NGRAM and responses:
        tokens = int(given.get("speculative_num_draft_tokens") or NGRAM_DRAFT_TOKENS)
        # The rest of the drafts continues what the server itself has generated of late.
        added["speculative_ngram_external_sam_budget"] = max(1, (tokens - 1) * 3 // 4)
        # Twice, because a new corpus is loaded before it replaces the last one.
        added["speculative_ngram_external_corpus_max_tokens"] = 2 * CORPUS_TOKENS
    return {name: value for name, value in added.items() if given.get(name) is None}


def most_requests(drafts: Speculation, flags: Mapping[str, Any], concurrency: int) -> int:
    """Requests that a server with drafts takes at once where the job does not say: SGLang would take 48.

    Steps that adapt become so few for many requests that all of `concurrency` fit.
    """
    if flags.get("speculative_adaptive"):
        return concurrency
    ngram = drafts.kind is DraftKind.NGRAM and flags.get("speculative_num_draft_tokens") is None
    tokens = NGRAM_DRAFT_TOKENS if ngram else drafts.num_draft_tokens
    return max(1, min(concurrency, VERIFIED_AT_ONCE // tokens))


def corpus_tokens(flags: Mapping[str, Any]) -> int:
    """Tokens that a corpus may have in a server with these flags, which holds two for a moment."""
    most = flags.get("speculative_ngram_external_corpus_max_tokens")
    return CORPUS_TOKENS if most is None else int(most) // 2


def runs_draft_model(drafts: Speculation) -> bool:
    """Whether servers hold a draft model, with weights of its own or the policy's."""
    return drafts.kind in (*_STEPPED, DraftKind.OTHER)
