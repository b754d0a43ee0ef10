"""The body of POST /generate, as SGLang's clients write it, and its answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from miles.services.rollout.engines.base import FinishReason, SamplingParams
from miles.services.rollout.groups.partial_response import Piece

_SAMPLING = frozenset({"max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids"})
_TEXT = frozenset({"skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens", "sampling_seed"})
_NEUTRAL: Mapping[str, Any] = {"repetition_penalty": 1.0, "n": 1}
"""Values other than nothing at which a parameter changes nothing."""
_BODY = frozenset({"input_ids", "text", "sampling_params", "return_logprob", "rid", "return_text_in_logprobs"})


class PayloadError(ValueError):
    """A request that the endpoint does not serve; the message says which part and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateCall:
    """One request to generate."""

    input_ids: Sequence[int]
    sampling: SamplingParams
    """Its seed is 0 unless the request names one."""
    seeded: bool
    skip_special_tokens: bool
    trim_stop: bool
    """Whether the text ends before what ended it."""


@dataclasses.dataclass(frozen=True, slots=True)
class TextTools:
    """Conversion between text and tokens, and the limits of the model."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int], bool], str]
    """(tokens, leave out special tokens) -> text."""
    end_tokens: frozenset[int]
    """Tokens of the model that end a response."""
    longest: int | None
    """Most tokens of input and output together, when it is known."""


def read_call(body: Any, tools: TextTools) -> GenerateCall:
    """Read a request. What SGLang takes and this endpoint does not is refused, unless it would change nothing.

    Text is tokenised without special tokens, as prompts are. Raises PayloadError.
    """
    if not isinstance(body, dict):
        raise PayloadError("the body is not a JSON object")
    _refuse_others(body, _BODY, {"logprob_start_len": -1}, "")
    params = body.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise PayloadError("sampling_params is not a JSON object; there is one request a call")
    _refuse_others(params, _SAMPLING | _TEXT, _NEUTRAL, "sampling_params.")
    input_ids = _input_ids(body, tools)
    most = _number(params, "max_new_tokens", int, 128)
    if tools.longest is not None:
        most = min(most, tools.longest - len(input_ids))
    stop = params.get("stop") or ()
    return GenerateCall(
        input_ids=input_ids,
        sampling=SamplingParams(
            max_new_tokens=most,
            min_new_tokens=min(max(most, 0), _number(params, "min_new_tokens", int, 0)),
            temperature=_number(params, "temperature", float, 1.0),
            top_p=_number(params, "top_p", float, 1.0),
            top_k=_number(params, "top_k", int, -1),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(params.get("stop_token_ids") or ()),
            seed=_number(params, "sampling_seed", int, 0),
        ),
        seeded=params.get("sampling_seed") is not None,
        skip_special_tokens=params.get("skip_special_tokens") is not False,
        trim_stop=not params.get("no_stop_trim"),
    )


def answer(call: GenerateCall, piece: Piece, tools: TextTools, *, rid: str, began_s: float) -> dict[str, Any]:
    """Build the answer of a request that has ended. `began_s` is on the monotonic clock."""
    result = piece.result
    assert result is not None
    matched = _matched(call, piece, tools)
    versions = [span.version for span in result.weight_versions]
    tokens = piece.token_ids
    if call.trim_stop and isinstance(matched, int):
        tokens = tokens[:-1]
    text = tools.decode(tokens, call.skip_special_tokens)
    if call.trim_stop and isinstance(matched, str):
        text = text.partition(matched)[0]
    reason: dict[str, Any] = {"type": result.reason.value}
    if result.reason is FinishReason.STOP:
        reason["matched"] = matched
    elif result.reason is FinishReason.LENGTH:
        reason["length"] = len(piece.token_ids)
    meta = {
        "id": rid,
        "finish_reason": reason,
        "prompt_tokens": len(call.input_ids),
        "completion_tokens": len(piece.token_ids),
        "cached_tokens": result.cached_prompt_tokens,
        "weight_version": str(versions[-1]) if versions else None,
        "e2e_latency": time.monotonic() - began_s,
        "output_token_logprobs": [
            [log_prob, token, None] for log_prob, token in zip(piece.log_probs, piece.token_ids, strict=True)
        ],
    }
    if (speculative := result.speculative) is not None:
        meta |= {
            "spec_accept_token_num": speculative.accepted_draft_tokens,
            "spec_draft_token_num": speculative.proposed_draft_tokens,
            "spec_verify_ct": speculative.verify_count,
        }
    return {"text": text, "output_ids": piece.token_ids, "meta_info": meta}


def _matched(call: GenerateCall, piece: Piece, tools: TextTools) -> int | str | None:
    """Return the token or the text that ended the output."""
    assert piece.result is not None
    if piece.result.reason is not FinishReason.STOP or not piece.token_ids:
        return None
    last = piece.token_ids[-1]
    if last in tools.end_tokens or last in call.sampling.stop_token_ids:
        return last
    text = tools.decode(piece.token_ids, False)
    return next((stop for stop in call.sampling.stop if stop in text), None)


def _input_ids(body: Mapping[str, Any], tools: TextTools) -> list[int]:
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise PayloadError("give either text or input_ids")
    if ids is None:
        if not isinstance(text, str):
            raise PayloadError("text is no single text; there is one request a call")
        ids = tools.encode(text)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise PayloadError("input_ids is no list of token ids; there is one request a call")
    if not ids:
        raise PayloadError("there are no input tokens")
    return ids


def _number(params: Mapping[str, Any], name: str, kind: type[int] | type[float], default: Any) -> Any:
    value = params.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise PayloadError(f"sampling_params.{name} = {value!r} is no number")
    return kind(value)


def _refuse_others(given: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, Any], path: str) -> None:
    """Raise for what would change the output and is not served."""
    others = {
        name: value for name, value in given.items() if name not in known and value and value != neutral.get(name)
    }
    if others:
        shown = ", ".join(f"{path}{name} = {str(value)[:100]}" for name, value in others.items())
        raise PayloadError(f"{shown}: not served here; leave it out")
