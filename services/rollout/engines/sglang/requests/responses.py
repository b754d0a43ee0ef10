"""Decodes the events of a streamed response into deltas, without losing or repeating a token."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from miles.services.rollout.engines.base import EngineFailed, FinishReason, GenerationDelta, GenerationResult
from miles.services.rollout.engines.sglang.requests.routed_experts import decode_experts
from miles.types import SpeculativeStats, VersionSpan
from miles.types.experts import ExpertLayout

LARGE = 1 << 20
"""Characters of routed experts from which decoding takes milliseconds."""
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


class ResponseDecoder:
    """Decodes one response, event by event.

    A response whose experts the server has lost or overwritten ends with the reason ABORT and without them.

    A server may send only an event's new tokens or all tokens so far, and it repeats some when it aborts a waiting
    request; `completion_tokens` is always the total, so the new ones are the last of an event.
    """

    def __init__(
        self, input_tokens: int, experts: ExpertLayout | None = None, experts_start: int = 0, top_token_ids: int = 0
    ) -> None:
        """`experts`: how to read routed experts, which cover positions from `experts_start` on; None without them.

        `top_token_ids`: how many likeliest tokens were asked for.
        """
        self._top_token_ids = top_token_ids
        self._input_tokens = input_tokens
        self._experts = experts
        self._experts_start = experts_start
        self._received = 0

    async def decode_apart(self, event: Mapping[str, Any]) -> GenerationDelta:
        """Like `decode`, but in a thread where it would block the event loop: for many routed experts."""
        if len(event["meta_info"].get("routed_experts") or "") < LARGE:
            return self.decode(event)
        return await asyncio.to_thread(self.decode, event)

    def decode(self, event: Mapping[str, Any]) -> GenerationDelta:
        """Decode one event. Raises EngineFailed when it contradicts itself or leaves tokens out."""
        meta = event["meta_info"]
        total = int(meta["completion_tokens"])
        new = max(0, total - self._received)
        ids = _last(event["output_ids"], new, "tokens")
        entries = _last(meta.get("output_token_logprobs") or [], new, "log-probabilities")
        if [entry[1] for entry in entries] != ids:
            raise EngineFailed("SGLang's log-probabilities are of other tokens than its response")
        log_probs = [entry[0] for entry in entries]
        if None in log_probs:
            raise EngineFailed("SGLang's log-probabilities are no numbers: the weights hold NaN or infinity")
        self._received += new
        finish = meta.get("finish_reason")
        result = self._result(meta, finish) if finish is not None else None
        return GenerationDelta(ids, list(map(float, log_probs)), result, self._top_ids(meta, new))

    def _top_ids(self, meta: Mapping[str, Any], new: int) -> list[list[int]]:
        if not self._top_token_ids:
            return []
        rows = _last(meta.get("output_top_logprobs") or [], new, "likeliest tokens")
        return [[int(entry[1]) for entry in row or ()] for row in rows]

    def _result(self, meta: Mapping[str, Any], finish: Mapping[str, Any]) -> GenerationResult:
        reason = _REASONS.get(str(finish.get("type")))
        if reason is None:
            raise EngineFailed(f"SGLang ended a response for an unknown reason: {finish}")
        spans, retractions = version_spans(meta, self._received), int(meta.get("num_retractions") or 0)
        # Retracted requests are computed again, and their experts recorded again: with whose weights is not said.
        lost = self._experts is not None and retractions > 0 and len(spans) > 1
        return GenerationResult(
            reason=FinishReason.ABORT if lost else reason,
            weight_versions=spans,
            cached_prompt_tokens=int(meta.get("cached_tokens") or 0),
            routed_experts=None if lost else self._routed_experts(meta, reason),
            speculative=speculative_counters(meta),
            retractions=retractions,
        )

    def _routed_experts(self, meta: Mapping[str, Any], reason: FinishReason) -> Any:
        encoded = meta.get("routed_experts")
        if self._experts is None or (encoded is None and not self._received):
            return None
        if encoded is None and reason is FinishReason.ABORT:  # it was retracted, so that nothing holds them
            return None
        if encoded is None:
            raise EngineFailed("SGLang sent no routed experts: was it started with --enable-return-routed-experts?")
        rows = self._input_tokens + self._received - 1 - self._experts_start
        return decode_experts(encoded, self._experts, rows)


def version_spans(meta: Mapping[str, Any], tokens: int) -> tuple[VersionSpan, ...]:
    """Which version produced which of `tokens` tokens. Raises EngineFailed for weights that no update loaded."""
    if not tokens:
        return ()
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": tokens}]
    found = []
    for span in spans:
        start, end = int(span["start"]), min(int(span["end"]), tokens)
        if start >= end:
            continue
        if not str(span["version"]).isdecimal():
            raise EngineFailed(f"SGLang generated with weights of version {span['version']!r}, which no update brought")
        found.append(VersionSpan(int(span["version"]), start, end))
    if not found or found[0].start != 0 or found[-1].end != tokens:
        raise EngineFailed(f"SGLang's weight versions {spans} do not cover the response of {tokens} tokens")
    return tuple(found)


def _last(items: Sequence[Any], count: int, what: str) -> list[Any]:
    if len(items) < count:
        raise EngineFailed(f"SGLang left out {count - len(items)} {what} of a response")
    return list(items[len(items) - count :])


def speculative_counters(meta: Mapping[str, Any]) -> SpeculativeStats | None:
    """A request's drafts so far; None for one without.

    SGLang counts as proposed what it proposes at most: where it adapts its steps, fewer may have been.
    """
    if not meta.get("spec_verify_ct"):
        return None
    return SpeculativeStats(
        accepted_draft_tokens=int(meta.get("spec_num_correct_drafts") or 0),
        proposed_draft_tokens=int(meta.get("spec_num_proposed_drafts") or 0),
        verify_count=int(meta["spec_verify_ct"]),
    )
