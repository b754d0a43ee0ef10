"""Passes over a batch without gradient: log-probabilities or values, and scores of token sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.token_sets import TokenSetScores
from miles.services.trainer.backends.fsdp.model.forward import LogProbForward
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.progress import Progress, Report
from miles.services.trainer.step.token_sets import TokenSetRequest
from miles.telemetry.tracing import traced

_OutputT_co = TypeVar("_OutputT_co", covariant=True)


class ForwardPass(Protocol[_OutputT_co]):
    """One micro-batch through a model."""

    device: torch.device

    def for_loss(self, model: torch.nn.Module, micro_batch: MicroBatch) -> _OutputT_co:
        """The forward output with all that a loss needs."""

    def per_token(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """The log-probability or value of each response token alone; float32 [R]."""


@traced("log-probs")
def forward_batch(
    model: torch.nn.Module,
    weights: WorkingWeights,
    forward: ForwardPass[Any],
    batch: RolloutBatch,
    report: Report,
    routing: Routing | None,
    per_token: Callable[[torch.nn.Module, MicroBatch], torch.Tensor] | None = None,
    columns: tuple[int, ...] = (),
) -> torch.Tensor:
    """The log-probability or value of each of this rank's response tokens, without gradient; float32 [T].

    Or what else `per_token` gives, [R, *columns] of a micro-batch: [T, *columns].
    """
    compute = per_token or forward.per_token
    result = torch.zeros(batch.packing.num_tokens, *columns, device=forward.device)
    with weights.in_use(), torch.no_grad():
        for micro_batch, where_R in _passes(batch, report, routing):
            result[to_device(where_R, result.device)] = compute(model, micro_batch)
    return result


@traced("token sets")
def score_sets(
    model: torch.nn.Module,
    weights: WorkingWeights,
    forward: ForwardPass[Any],
    batch: RolloutBatch,
    request: TokenSetRequest,
    report: Report,
    routing: Routing | None,
) -> TokenSetScores:
    """The scores of tokens at each of this rank's response tokens, without gradient."""
    assert isinstance(forward, LogProbForward), "a critic has no tokens"
    result_TX = torch.zeros(batch.packing.num_tokens, request.columns, device=forward.device)
    with weights.in_use(), torch.no_grad():
        for micro_batch, where_R in _passes(batch, report, routing):
            tokens_RM = request.tokens_at(where_R)
            scores = forward.token_sets(model, micro_batch, tokens_RM, request.top_k)
            result_TX[to_device(where_R, result_TX.device)] = scores.joined().float()
    return TokenSetScores.from_joined(result_TX, request.top_k)


def _passes(batch: RolloutBatch, report: Report, routing: Routing | None) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """Micro-batches of a pass without gradient, each with the indices [R] in T of its response tokens."""
    micro_batches: Sequence[MicroBatch] = batch.log_prob_micro_batches
    if routing is not None and routing.keeps:  # by micro-batch, so it takes those of the training pass
        micro_batches = batch.micro_batches
    for done, micro_batch in enumerate(micro_batches):
        report(Progress("log_probs", done, len(micro_batches)))
        if routing is not None:
            routing.before(batch, micro_batch, training=False)
        yield micro_batch, batch.token_indices(micro_batch)
        if routing is not None:
            routing.after(micro_batch)
