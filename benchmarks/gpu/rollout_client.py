"""A rollout service without a controller, and a client that streams responses from it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

PROMPT_TOKENS = 64
START_DEADLINE_S = 400.0


@contextlib.asynccontextmanager
async def rollout_service(device: str) -> AsyncIterator[str]:
    """A rollout service that stands alone; yields its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "miles.services.rollout", "--device", device), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        while line := await asyncio.wait_for(process.stdout.readline(), START_DEADLINE_S):
            if line.startswith(b"listening on "):
                break
        else:
            raise RuntimeError("the rollout service ended before it listened")
        yield line.decode().split()[-1]
    finally:
        process.terminate()
        await process.wait()


async def one_response(stub: Any, prompt: list[int], tokens: int, routing: bool) -> int:
    """Stream one response; how many tokens it has."""
    import numpy as np

    from miles.rpc.gen import rollout_pb2
    from miles.types.convert import array_from_proto, array_to_proto

    sampling = rollout_pb2.SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=tokens, min_new_tokens=tokens
    )
    request = rollout_pb2.GenerateRequest(
        job_id="bench",
        tokens=array_to_proto(np.asarray(prompt, np.int32)),
        sampling=sampling,
        return_routed_experts=routing,
    )
    count = 0
    async for message in stub.Generate(request):
        log_probs = array_from_proto(message.log_probs, "log_probs", dtypes=(np.float32,), ndim=1)
        count += len(log_probs)
        if routing and message.HasField("finished"):
            assert message.finished.routed_experts.shape[0] == PROMPT_TOKENS + count - 1
    return count
