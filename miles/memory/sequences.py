"""Memory that grows with the lengths of samples: what each path holds of a token, in bytes.

Counted from the code that holds it, which each function names; `tests/unit/memory` compares most of them with it, and
`benchmarks/long_sequences.py` the peaks of processes. Parameters, gradients and optimizers are another matter.
"""

from __future__ import annotations

import dataclasses

TOKEN_BYTES, LOG_PROB_BYTES, MASK_BYTES = 4, 4, 1
"""int32 of each token; float32 and, where a mask is given, uint8 of each response token (`miles.types.Sample`)."""
ROW_BYTES = 6 * 8
"""int64 of a micro-batch's row: token, position, its sample and place there; row and target of a response token."""
TENSOR_BYTES = 4
"""float32 of one number a response token."""
TOKEN_TENSORS = 7
"""Numbers a response token that a training step holds: mask, advantage, return, old, engine's and reference's
log-probability, and the log-probability that is recorded (`TokenTensors`)."""
COLUMNS_BYTES = 512
"""Most that a sample's lengths, status and counters take in a payload."""
SCORE_BYTES = (4 + 2) * 2**22
"""Mask of a block of attention that needs one: bool, two copies while it is made, and the kernel's numbers
(`masked_attention.MAX_SCORES`)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """The routed experts that are recorded of a token."""

    layers: int
    """Layers with experts."""
    top_k: int
    experts: int

    @property
    def bytes_per_token(self) -> int:
        """One byte a choice up to 256 experts, else two (`miles.types.experts.expert_dtype`)."""
        return self.layers * self.top_k * (1 if self.experts <= 256 else 2)


@dataclasses.dataclass(frozen=True, slots=True)
class SampleSize:
    """One prompt and one response to it."""

    prompt_tokens: int
    response_tokens: int
    routing: Routing | None = None
    text_bytes_per_token: float = 4.0
    """UTF-8 of prompt and response; English has about four bytes a token."""
    has_mask: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def routing_bytes(self) -> int:
        """Of every token but the last, which passes no layer."""
        return 0 if self.routing is None else (self.tokens - 1) * self.routing.bytes_per_token

    @property
    def light_bytes(self) -> int:
        """All but the routed experts: what every rank of a trainer gets of every sample."""
        arrays = self.tokens * TOKEN_BYTES + self.response_tokens * (LOG_PROB_BYTES + MASK_BYTES * self.has_mask)
        return arrays + int(self.tokens * self.text_bytes_per_token) + COLUMNS_BYTES

    @property
    def payload_bytes(self) -> int:
        """In the sample queue, as a half-finished sample, and in the log of whole samples (`miles.types.wire`)."""
        return self.light_bytes + self.routing_bytes

    @property
    def row_bytes(self) -> int:
        """As rows of a micro-batch (`services.trainer.batch.packing`)."""
        return self.tokens * ROW_BYTES


def redis_bytes(sample: SampleSize, *, samples_per_group: int, queued_groups: int, running_groups: int) -> int:
    """Largest payload of the queue: finished groups until a checkpoint covers them, and half-finished ones."""
    return (queued_groups + running_groups) * samples_per_group * sample.payload_bytes


def rollout_bytes(sample: SampleSize, *, running_samples: int, groups_being_put: int, samples_per_group: int) -> int:
    """A rollout's samples, and the payloads of groups that are on their way to the queue (one copy each)."""
    return (running_samples + groups_being_put * samples_per_group) * sample.payload_bytes


def first_rank_bytes(sample: SampleSize, *, samples: int, ranks: int) -> int:
    """Rank 0 at the beginning of a step: all samples as they were read, and decoded all but routed experts, which are
    views; for other ranks one group's light payload at a time is too little to count."""
    decoded = samples * sample.light_bytes
    return samples * sample.payload_bytes + decoded + (decoded if ranks > 1 else 0)


def rank_bytes(sample: SampleSize, *, samples: int, replicas: int) -> int:
    """Another rank: all samples without routed experts, payload and decoded, and those of its replica's share."""
    share = -(-samples // replicas)
    return 2 * samples * sample.light_bytes + share * sample.routing_bytes


def step_bytes(sample: SampleSize, *, samples: int, replicas: int) -> int:
    """What any rank holds of its share from the beginning to the end of a step: rows, and numbers a token."""
    share = -(-samples // replicas)
    return share * (sample.row_bytes + TOKEN_TENSORS * TENSOR_BYTES * sample.response_tokens)


def replay_bytes(rows: int, routing: Routing, *, keeps_activations: bool) -> int:
    """Replayed experts of one micro-batch's rows on a rank: as they came; int64 of one layer, or without gradient
    checkpointing of all, which the backward pass uses."""
    wide = rows * routing.top_k * 8
    return rows * routing.bytes_per_token + wide * (routing.layers if keeps_activations else 1)


def logit_bytes(rows: int, vocabulary: int, *, bytes_per_number: int, chunk_elements: int) -> int:
    """Logits of a micro-batch's response rows, in whose memory the gradient is written, and chunks in float32.

    A chunk's log-softmax, its probabilities and their gradient exist at a time (`miles.algorithms.log_probs`).
    """
    return rows * vocabulary * bytes_per_number + 4 * 4 * min(chunk_elements, rows * vocabulary)


def attention_bytes(rows: int, *, heads: int, kv_heads: int, head_size: int, bytes_per_number: int) -> int:
    """Queries, keys, values and outputs of one layer, their gradients, and one block's mask; no scores are kept."""
    return 2 * rows * (2 * heads + 2 * kv_heads) * head_size * bytes_per_number + SCORE_BYTES
