"""Asks SGLang for log-probabilities of tokens that are given, by requests that generate nothing.

SGLang scores prompts at temperature 1 whatever the temperature of the request. Entry i of an answer belongs to input
token `logprob_start_len` + i; the first is empty, because nothing before it was scored.
Dims: R response tokens, K likeliest tokens, M places of a set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.distillation.token_choice import NO_TOKEN
from miles.services.rollout.teachers.server import TeacherRefused, TeacherServer
from miles.types import Sample

PIECE = 32
"""Positions asked for at once, where each has tokens of its own: SGLang scores all of a request's tokens at each of
them, so that larger pieces have more scores that nobody wants, and smaller ones more copies of the prompt."""
LOWEST = -1e4
"""What an impossible token counts as, as in the trainer."""

Ids = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]


def body(input_ids: Sequence[int], start: int, **wanted: Any) -> dict[str, Any]:
    """The body of a request for log-probabilities from input token `start` + 1 on."""
    return {
        "input_ids": list(input_ids),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": start,
        **wanted,
    }


async def score_response(server: TeacherServer, sample: Sample) -> LogProbs:
    """Log-probabilities of the response tokens; float32 [R]."""
    if not sample.response_length:
        return np.zeros(0, np.float32)
    answer = await server.generate(body(sample.tokens.tolist(), sample.prompt_length - 1))
    rows = _rows(server, answer, "input_token_logprobs", sample.response_length)
    if [row[1] for row in rows] != sample.response_tokens.tolist():
        raise TeacherRefused(f"{server} scored other tokens than it was asked for: is its tokenizer the policy's?")
    return np.array([_number(server, row[0]) for row in rows], np.float32)


async def likeliest_tokens(server: TeacherServer, sample: Sample, count: int) -> tuple[Ids, LogProbs]:
    """The likeliest tokens at each response token, int32 [R, K], and their log-probabilities, float32 [R, K]."""
    ids, log_probs = np.full((sample.response_length, count), NO_TOKEN, np.int32), _impossible(sample, count)
    if not sample.response_length:
        return ids, log_probs
    answer = await server.generate(body(sample.tokens.tolist(), sample.prompt_length - 1, top_logprobs_num=count))
    for r, row in enumerate(_rows(server, answer, "input_top_logprobs", sample.response_length)):
        for k, entry in enumerate((row or ())[:count]):
            ids[r, k], log_probs[r, k] = entry[1], _number(server, entry[0])
    return ids, log_probs


async def score_tokens(server: TeacherServer, sample: Sample, ids_RM: Ids) -> LogProbs:
    """Log-probabilities of given tokens at each response token; float32 [R, M]. The others' entries mean nothing.

    The last piece goes first: the server then has the whole response in its prefix cache, which the others begin from.
    """
    found = _impossible(sample, ids_RM.shape[1])

    async def score(start: int) -> None:
        rows = slice(start, start + PIECE)
        wanted = np.unique(ids_RM[rows])
        wanted = wanted[wanted != NO_TOKEN]
        if not len(wanted):
            return
        end = min(start + PIECE, sample.response_length)
        tokens = sample.tokens[: sample.prompt_length + end].tolist()
        asked = body(tokens, sample.prompt_length + start - 1, token_ids_logprob=wanted.tolist())
        answer = await server.generate(asked)
        for r, row in enumerate(_rows(server, answer, "input_token_ids_logprobs", end - start), start):
            known = {entry[1]: entry[0] for entry in row or ()}
            for m, token in enumerate(ids_RM[r].tolist()):
                if token != NO_TOKEN:
                    if token not in known:
                        raise TeacherRefused(f"{server} left out token {token}, which it was asked for")
                    found[r, m] = _number(server, known[token])

    *others, last = range(0, sample.response_length, PIECE) if sample.response_length else [0]
    await score(last)
    await asyncio.gather(*map(score, others))
    return found


def _impossible(sample: Sample, count: int) -> LogProbs:
    return np.full((sample.response_length, count), LOWEST, np.float32)


def _rows(server: TeacherServer, answer: Mapping[str, Any], field: str, count: int) -> list[Any]:
    """The last entries of a field of an answer."""
    meta = answer.get("meta_info")
    rows = meta.get(field) if isinstance(meta, dict) else None
    if not isinstance(rows, list) or len(rows) < count:
        there = "none" if not isinstance(rows, list) else str(len(rows))
        raise TeacherRefused(f"{server} answered with {there} instead of {count} {field}: is it SGLang's /generate?")
    return rows[len(rows) - count :]


def _number(server: TeacherServer, value: Any) -> float:
    """A log-probability; JSON has no −inf, for which some versions send the lowest number of the type."""
    if not isinstance(value, int | float) or value != value:
        raise TeacherRefused(f"{server} gives log-probabilities that are no numbers: its weights hold NaN or infinity")
    return max(float(value), LOWEST)
