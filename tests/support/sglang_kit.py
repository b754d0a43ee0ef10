"""Tiny checkpoints, an SGLang engine that serves them, and Hugging Face's results for the same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch

from miles.services.rollout.engines.base import GenerationRequest, GenerationResult, SamplingParams
from miles.services.rollout.engines.sglang import SglangEngine, SglangOptions
from miles.weights.naming.model_tensors import once
from miles.weights.naming.rules import conversion_of

CPU_PYTHON = pathlib.Path(__file__).parent / "sglang_cpu" / "python"
ON_GPU = torch.cuda.is_available()
CPU_FLAGS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "max_total_tokens": 8192,
    "mem_fraction_static": 0.3,
    "stream_interval": 16,
    "log_level": "warning",
}
GPU_FLAGS: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "max_total_tokens": 65536,
    "mem_fraction_static": 0.3,
    "cuda_graph_bs_decode": [1, 16],
    "disable_prefill_cuda_graph": True,
    "log_level": "warning",
}


def have_sglang() -> bool:
    """Whether there is an SGLang to start: the one for tests on the CPU, or this interpreter's own on a GPU."""
    return ON_GPU or "MILES_TEST_SGLANG" in os.environ


def options(folder: pathlib.Path, logs: pathlib.Path, **changes: Any) -> SglangOptions:
    """Options of an engine on the checkpoint in `folder`."""
    given: dict[str, Any] = {
        "hf_checkpoint": str(folder),
        "device": "cuda" if ON_GPU else "cpu",
        "dtype": "float32",
        "max_running_requests": 16,
        "max_total_tokens": 500,
        "log_dir": logs,
        "server_flags": dict(GPU_FLAGS if ON_GPU else CPU_FLAGS),
        **({} if ON_GPU else {"python": str(CPU_PYTHON)}),
    }
    return SglangOptions(**given | changes)


@contextlib.asynccontextmanager
async def running(given: SglangOptions) -> AsyncIterator[SglangEngine]:
    """A started engine, closed in the end."""
    engine = SglangEngine(given)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def published_weights(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights as a trainer publishes them for SGLang."""
    held = {name: tensor.detach() for name, tensor in once(model.state_dict(keep_vars=True)).items()}
    return {name: tensor.clone() for name, tensor in conversion_of(model, held).to_checkpoint(held.items())}


@dataclasses.dataclass
class Response:
    """A whole response."""

    tokens: list[int]
    log_probs: list[float]
    result: GenerationResult
    deltas: int


_serial = iter(range(1_000_000))


async def respond(
    engine: SglangEngine,
    prompt: Sequence[int],
    *,
    request_id: str = "",
    resumed_tokens: int = 0,
    experts: bool = False,
    experts_start: int = 0,
    group: str = "",
    begun: asyncio.Event | None = None,
    **sampling: Any,
) -> Response:
    """Generate one response to its end; sets `begun` at its first tokens."""
    request = GenerationRequest(
        request_id or f"request-{next(_serial)}",
        list(prompt),
        SamplingParams(**{"max_new_tokens": 24, **sampling}),
        resumed_tokens=resumed_tokens,
        return_routed_experts=experts,
        routed_experts_start=experts_start,
        group=group,
    )
    tokens: list[int] = []
    log_probs: list[float] = []
    count = 0
    result = None
    async for delta in engine.generate(request):
        tokens += delta.token_ids
        log_probs += delta.log_probs
        count += 1
        result = delta.result
        if begun is not None and tokens:
            begun.set()
    assert result is not None
    return Response(tokens, log_probs, result, count)


def reference_log_probs(
    model: torch.nn.Module,
    prompt: Sequence[int],
    tokens: Sequence[int],
    temperature: float = 1.0,
    impossible: Sequence[int] = (),
) -> torch.Tensor:
    """What a plain forward pass of the Hugging Face model gives each response token, float64 (tokens,).

    `impossible`: tokens that could not be sampled; SGLang rules out end tokens before min_new_tokens.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    with torch.no_grad():
        logits_TV = model(ids).logits[0].double() / temperature
    logits_TV[:, list(impossible)] = -torch.inf
    wanted = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return wanted.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0].cpu()


def largest_difference(response: Response, expected: torch.Tensor) -> float:
    """Between the log-probabilities of a response and those expected."""
    return float((torch.tensor(response.log_probs, dtype=torch.float64) - expected).abs().max())
