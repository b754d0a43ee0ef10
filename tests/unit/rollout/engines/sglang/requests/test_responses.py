from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.base import EngineFailed, FinishReason
from miles.services.rollout.engines.sglang.requests.responses import ResponseDecoder, version_spans
from miles.services.rollout.engines.sglang.requests.routed_experts import decode_experts
from miles.types import SpeculativeStats, VersionSpan
from miles.types.experts import ExpertLayout, expert_layout


def event(tokens: list[int], total: int, finish: str | None = None, **meta: Any) -> dict[str, Any]:
    """An event whose `output_ids` are these tokens, of a response that has `total` by now."""
    return {
        "output_ids": tokens,
        "meta_info": {
            "completion_tokens": total,
            "output_token_logprobs": [[-float(token), token, None] for token in tokens],
            "weight_version": "3",
            "cached_tokens": 2,
            "finish_reason": {"type": finish} if finish else None,
            **meta,
        },
    }


@given(tokens=st.lists(st.integers(0, 99), max_size=30), data=st.data(), cumulative=st.booleans())
def test_a_response_comes_out_whole_however_it_is_cut(tokens: list[int], data: st.DataObject, cumulative: bool) -> None:
    cuts = [*sorted(data.draw(st.sets(st.integers(0, len(tokens)), max_size=4))), len(tokens)]
    decoder = ResponseDecoder(5)
    found, log_probs, start = [], [], 0
    for i, end in enumerate(cuts):
        sent = tokens[:end] if cumulative else tokens[start:end]
        delta = decoder.decode(event(sent, end, "length" if i == len(cuts) - 1 else None))
        found += delta.token_ids
        log_probs += delta.log_probs
        start = end
    assert found == tokens
    assert log_probs == [-float(token) for token in tokens]
    assert delta.result is not None
    assert delta.result.reason is FinishReason.LENGTH
    assert delta.result.weight_versions == ((VersionSpan(3, 0, len(tokens)),) if tokens else ())
    assert delta.result.cached_prompt_tokens == 2


def test_an_abort_in_the_waiting_queue_repeats_no_token() -> None:
    decoder = ResponseDecoder(5)
    decoder.decode(event([1, 2, 3], 3))
    last = event([3], 3, "abort")
    last["meta_info"]["output_token_logprobs"] = [[-float(token), token, None] for token in (1, 2, 3)]
    delta = decoder.decode(last)
    assert (delta.token_ids, delta.log_probs) == ([], [])
    assert delta.result is not None
    assert delta.result.reason is FinishReason.ABORT


LAYOUT = ExpertLayout(layers=1, moe_layers=(0,), top_k=1, experts=4)


def two_versions() -> list[dict[str, Any]]:
    return [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]


def test_an_abort_of_a_retracted_request_has_lost_its_experts() -> None:
    delta = ResponseDecoder(1, LAYOUT).decode(event([1, 2], 2, "abort", num_retractions=1))
    assert delta.result is not None
    assert (delta.result.reason, delta.result.routed_experts, delta.result.retractions) == (FinishReason.ABORT, None, 1)


def test_experts_that_another_version_recorded_again_are_not_taken() -> None:
    given = {"routed_experts": encoded(np.zeros((2, 1, 1), np.int32)), "weight_versions": two_versions()}
    whole = ResponseDecoder(1, LAYOUT).decode(event([1, 2], 2, "stop", **given)).result
    assert whole is not None
    assert whole.reason is FinishReason.STOP
    assert whole.routed_experts is not None
    again = ResponseDecoder(1, LAYOUT).decode(event([1, 2], 2, "stop", num_retractions=1, **given)).result
    assert again is not None
    assert (again.reason, again.routed_experts) == (FinishReason.ABORT, None)
    unrecorded = ResponseDecoder(1).decode(event([1, 2], 2, "stop", num_retractions=1, **given)).result
    assert unrecorded is not None
    assert unrecorded.reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (event([1], 2), "left out 1 tokens"),
        (event([1], 1) | {"output_ids": [2]}, "of other tokens"),
        (event([1], 1, output_token_logprobs=[[None, 1, None]]), "no numbers"),
        (event([1], 1, "dunno"), "unknown reason"),
        (event([1], 1, "stop", weight_version="default"), "which no update brought"),
    ],
)
def test_contradictions_are_found(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineFailed, match=message):
        ResponseDecoder(5).decode(wrong)


def test_version_spans_are_cut_to_the_tokens_there_are() -> None:
    spans = [{"version": "1", "start": 0, "end": 4}, {"version": "2", "start": 4, "end": 9}]
    assert version_spans({"weight_versions": spans}, 6) == (VersionSpan(1, 0, 4), VersionSpan(2, 4, 6))
    assert version_spans({"weight_versions": spans}, 3) == (VersionSpan(1, 0, 3),)
    with pytest.raises(EngineFailed, match="do not cover"):
        version_spans({"weight_versions": spans[1:]}, 6)


def test_speculative_statistics_are_kept() -> None:
    meta = {"spec_verify_ct": 3, "spec_num_correct_drafts": 4, "spec_num_proposed_drafts": 9}
    delta = ResponseDecoder(1).decode(event([1], 1, "stop", **meta))
    assert delta.result is not None
    assert delta.result.speculative == SpeculativeStats(4, 9, 3)


def encoded(experts: np.ndarray) -> str:
    return base64.b64encode(experts.astype(np.int32).tobytes()).decode()


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.uint16)])
@pytest.mark.parametrize("moe_layers", [(0, 1, 2), (1, 2)], ids=["all", "dense-first"])
def test_experts_are_narrowed_and_dense_layers_left_out(
    experts: int, dtype: type[np.generic], moe_layers: tuple[int, ...]
) -> None:
    layout = ExpertLayout(layers=3, moe_layers=moe_layers, top_k=2, experts=experts)
    wide = np.random.default_rng(0).integers(0, experts, (5, 3, 2))
    if 0 not in moe_layers:
        wide[:, 0] = -1  # whatever stands there
    found = decode_experts(encoded(wide), layout, 5)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wide[:, list(moe_layers)])


def test_experts_of_another_shape_or_model_are_refused() -> None:
    layout = ExpertLayout(layers=2, moe_layers=(0, 1), top_k=2, experts=8)
    with pytest.raises(EngineFailed, match="64 characters of expert numbers; 4 tokens"):
        decode_experts(encoded(np.zeros((3, 2, 2))), layout, 4)
    with pytest.raises(EngineFailed, match="from 0 to 8"):
        decode_experts(encoded(np.array([[[0, 1], [2, 8]]])), layout, 1)
    with pytest.raises(EngineFailed, match="no base64"):
        decode_experts("*" * 24, layout, 1)


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_long_routed_experts_are_decoded_in_slices_that_fit_together(top_k: int) -> None:
    layout = ExpertLayout(layers=5, moe_layers=(1, 2, 4), top_k=top_k, experts=300)
    wide = np.random.default_rng(0).integers(0, 300, (20_001, 5, top_k))
    np.testing.assert_array_equal(decode_experts(encoded(wide), layout, 20_001), wide[:, [1, 2, 4]])


def test_a_response_brings_experts_from_the_position_asked_for() -> None:
    layout = ExpertLayout(layers=1, moe_layers=(0,), top_k=1, experts=8)
    decoder = ResponseDecoder(5, layout, experts_start=4)
    rows = np.arange(2).reshape(2, 1, 1)
    delta = decoder.decode(event([7, 8], 2, "stop", routed_experts=encoded(rows)))
    assert delta.result is not None
    assert delta.result.routed_experts is not None
    assert delta.result.routed_experts.shape == (2, 1, 1)
    with pytest.raises(EngineFailed, match="no routed experts"):
        ResponseDecoder(5, layout).decode(event([7], 1, "stop"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3}, None),
        ({"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}, (0, 1)),
        ({"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0]}, (1, 2)),
        ({"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2}, (1, 3)),
        ({"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}, (1, 2)),
        (
            {
                "num_hidden_layers": 4,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 1,
                "moe_layer_freq": 1,
            },
            (1, 2, 3),
        ),
        ({"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2}, (0, 1)),
        ({"text_config": {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 2}}, (0,)),
    ],
)
def test_layers_with_experts_are_read_from_the_configuration(
    config: dict[str, Any], expected: tuple[int, ...] | None
) -> None:
    layout = expert_layout(config)
    assert (layout.moe_layers if layout else None) == expected


@pytest.mark.parametrize("cumulative", [False, True])
def test_likeliest_tokens_come_beside_new_tokens(cumulative: bool) -> None:
    decoder, rows = ResponseDecoder(5, top_token_ids=2), [[[-0.1, t, None], [-0.2, t + 1, None]] for t in (4, 6, 8)]
    first = decoder.decode(event([4], 1, output_top_logprobs=rows[:1]))
    sent = [4, 6, 8] if cumulative else [6, 8]
    last = decoder.decode(event(sent, 3, "stop", output_top_logprobs=rows if cumulative else rows[1:]))
    assert [*first.top_token_ids, *last.top_token_ids] == [[4, 5], [6, 7], [8, 9]]
    with pytest.raises(EngineFailed, match="left out 1 likeliest tokens"):
        ResponseDecoder(5, top_token_ids=2).decode(event([4], 1))
