"""Store of the newest responses to each prompt, from which engines draft the next ones.

A prompt is known by its tokens, so that epochs, changed data sets and evaluation find what there is. A response that is
lost costs time, nothing else: nothing is retried here, and memory goes to the prompts that were answered last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.queue.blobs import content_hash
from miles.queue.fencing import IS_FENCED, Holder, stamp
from miles.queue.keys import JobKeys
from miles.queue.pipelining import Pipeliner

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import redis.asyncio

    Tokens = npt.NDArray[np.int32]

MAX_BYTES = 512 << 20
"""Most that is kept of a job, at 4 bytes a token; the prompts that were answered longest ago go first."""
MAX_SHARE = 8
"""Nor is more kept than this part of the server's `maxmemory`, which finished groups need."""
MAX_RESPONSE_TOKENS = 1 << 16
"""Of a longer response the beginning is kept."""
RESPONSE_TTL_S = 7 * 24 * 3600
"""How long the responses to a prompt are kept after the last one was added."""

_TOKEN = "<i4"

ADD_RESPONSES = (
    IS_FENCED
    + """
-- KEYS responses, ages, sizes, fences
-- ARGV worker_id, lease_number, key_prefix, prompt, per_prompt, max_bytes, ttl_s, then responses, the newest last
local key, ages, sizes = KEYS[1], KEYS[2], KEYS[3]
local prefix, prompt, per_prompt, max_bytes, ttl_s = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
if fenced(KEYS[4], ARGV[1], ARGV[2]) then return 'fenced' end
local time = redis.call('TIME')
local now_s = time[1] + time[2] / 1e6
redis.call('ZADD', ages, now_s, prompt)
for i = 8, #ARGV do
  redis.call('LREM', key, 0, ARGV[i])
  redis.call('LPUSH', key, ARGV[i])
end
redis.call('LTRIM', key, 0, per_prompt - 1)
local bytes = 256  -- what Redis needs beside the tokens
for _, response in ipairs(redis.call('LRANGE', key, 0, -1)) do bytes = bytes + #response end
local total = redis.call('HINCRBY', sizes, '', bytes - (redis.call('HGET', sizes, prompt) or 0))
redis.call('HSET', sizes, prompt, bytes)
local oldest = redis.call('ZRANGE', ages, 0, 0, 'WITHSCORES')
while oldest[1] and (total > max_bytes or tonumber(oldest[2]) < now_s - ttl_s) do
  redis.call('UNLINK', prefix .. oldest[1])
  total = redis.call('HINCRBY', sizes, '', -redis.call('HGET', sizes, oldest[1]))
  redis.call('HDEL', sizes, oldest[1])
  redis.call('ZREM', ages, oldest[1])
  oldest = redis.call('ZRANGE', ages, 0, 0, 'WITHSCORES')
end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ttl_s) end
return 'added'
"""
)
"""Add responses to a prompt, each once, and delete what is too old or too much. Begins with a write that a full server
refuses. Returns added, or fenced."""


class ResponseStore:
    """The newest responses to each prompt of a job; all engines of the job share them.

    Call `fit_server` once before the first `add`. Errors of Redis are raised: callers go on without drafts.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        job_id: str,
        *,
        per_prompt: int,
        max_bytes: int = MAX_BYTES,
        ttl_s: int = RESPONSE_TTL_S,
    ) -> None:
        """Keep `per_prompt` responses to a prompt, and at most `max_bytes` in all."""
        self._redis = redis
        self._keys = JobKeys(job_id)
        self._per_prompt = per_prompt
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._pipeliner = Pipeliner(redis)
        self._add = redis.register_script(ADD_RESPONSES)

    async def fit_server(self) -> None:
        """Keep less where the server's memory is limited."""
        info: Any = await self._redis.info("memory")
        if limit := int(info.get("maxmemory", 0)):
            self._max_bytes = min(self._max_bytes, limit // MAX_SHARE)

    async def add(self, prompt: Tokens, responses: Sequence[Tokens], holder: Holder | None = None) -> None:
        """Add responses to a prompt, the newest last; empty ones, and those under a lease that has ended, are left out.

        A response that is kept already becomes the newest.
        """
        payloads = [_encode(response[:MAX_RESPONSE_TOKENS]) for response in responses if len(response)]
        newest_first = list(dict.fromkeys(reversed(payloads)))[: self._per_prompt]
        if not newest_first:
            return
        keys, name = self._keys, _name(prompt)
        await self._add(
            keys=[keys.responses(name), keys.response_ages, keys.response_sizes, keys.fences],
            args=[
                *stamp(holder),
                keys.responses_prefix,
                name,
                self._per_prompt,
                self._max_bytes,
                self._ttl_s,
                *reversed(newest_first),
            ],
        )

    async def newest(self, prompt: Tokens) -> list[Tokens]:
        """Return the responses that are kept to a prompt, the newest first; read-only int32 [tokens] each.

        Concurrent calls share a round trip.
        """
        import numpy as np

        command = ("LRANGE", self._keys.responses(_name(prompt)), 0, self._per_prompt - 1)
        [payloads] = await self._pipeliner.run([command], 0)
        return [np.frombuffer(payload, _TOKEN).astype(np.int32, copy=False) for payload in payloads]


def _encode(tokens: Tokens) -> bytes:
    return tokens.astype(_TOKEN, copy=False).tobytes()


def _name(prompt: Tokens) -> str:
    return content_hash(_encode(prompt))
