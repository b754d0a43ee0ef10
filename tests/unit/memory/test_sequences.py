"""The formulas are of what the code holds."""

from __future__ import annotations

import numpy as np
import pytest

from miles.memory.sequences import Routing, SampleSize, redis_bytes, replay_bytes, step_bytes
from miles.queue.payload import encode_group
from miles.services.trainer.batch.packing import pack
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

PROMPT, RESPONSE = 40, 500


def sample_of(routing: Routing | None, *, has_mask: bool) -> Sample:
    dtype = np.uint8 if routing is None or routing.experts <= 256 else np.uint16
    return Sample(
        group_id=0,
        index=0,
        prompt="w" * 4 * PROMPT,
        tokens=np.arange(PROMPT + RESPONSE, dtype=np.int32),
        response_length=RESPONSE,
        response="word" * RESPONSE,
        status=SampleStatus.COMPLETED,
        reward=1.0,
        loss_mask=np.ones(RESPONSE, np.uint8) if has_mask else None,
        rollout_log_probs=np.zeros(RESPONSE, np.float32),
        rollout_routed_experts=None
        if routing is None
        else np.zeros((PROMPT + RESPONSE - 1, routing.layers, routing.top_k), dtype),
        weight_versions=(VersionSpan(0, 0, RESPONSE),),
    )


@pytest.mark.parametrize("routing", [None, Routing(60, 8, 128), Routing(3, 2, 512)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_payload_has_the_bytes_that_are_said(routing: Routing | None, has_mask: bool) -> None:
    size = SampleSize(PROMPT, RESPONSE, routing, has_mask=has_mask)
    payload = encode_group(SampleGroup("job", 0, [sample_of(routing, has_mask=has_mask)]))
    assert size.payload_bytes - 512 < len(payload) <= size.payload_bytes


def test_a_response_of_32k_tokens_with_the_routing_of_60_layers_has_16_megabytes() -> None:
    size = SampleSize(0, 32768, Routing(60, 8, 128))
    assert size.routing_bytes == 32767 * 480
    assert 16.0e6 < size.payload_bytes < 16.2e6
    assert redis_bytes(size, samples_per_group=8, queued_groups=32, running_groups=0) == 256 * size.payload_bytes


def test_rows_have_the_bytes_that_are_said() -> None:
    samples = [sample_of(None, has_mask=False) for _ in range(3)]
    batch = pack(samples, range(3), share_prompts=False)
    arrays = (batch.input_ids_T, batch.position_ids_T, batch.row_sources_T, batch.logit_rows_R, batch.targets_R)
    held = sum(array.nbytes for array in arrays)
    size = SampleSize(PROMPT, RESPONSE)
    assert 0.9 * 3 * size.row_bytes < held <= 3 * size.row_bytes
    assert step_bytes(size, samples=3, replicas=2) == 2 * (size.row_bytes + 7 * 4 * RESPONSE)


@pytest.mark.parametrize("routing", [Routing(60, 8, 128), Routing(3, 2, 512)])
def test_replayed_experts_have_the_bytes_that_are_said(routing: Routing) -> None:
    samples = [sample_of(routing, has_mask=False)]
    batch = pack(samples, [0], share_prompts=False)
    held = rollout_routing(samples, batch).numpy().nbytes
    wide = batch.num_rows * routing.top_k * 8
    assert held + wide == replay_bytes(batch.num_rows, routing, keeps_activations=False)
    assert held + wide * routing.layers == replay_bytes(batch.num_rows, routing, keeps_activations=True)
