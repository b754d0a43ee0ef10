"""With drafts, right, wrong or none, every response is what it is without: bit for bit, and by the policy's odds."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch_drafts import Driver, Generated, Oracle, alike, futures, request_of
from torch_engine_models import prompt_of, respond, running_engine, save_checkpoint, weights_of

from miles.config.speculation import DraftKind, Speculation
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.services.rollout.engines.base import FinishReason, GenerationRequest, SpeculationState
from miles.types import SpeculativeStats, VersionSpan
from miles.weights.export_format import formatted

pytestmark = pytest.mark.engine

CASES = [
    ("llama", "float32"),
    ("qwen3", "bfloat16"),
    ("qwen3_moe", "float32"),
    ("deepseek_v3", "float32"),
]


def requests() -> list[GenerationRequest]:
    """Requests of many kinds: sampled and greedy, with stops, of a group that shares its prompt."""
    group = prompt_of(21, 9)
    return [
        request_of("sampled", prompt_of(30, 1), seed=1, routed=True, top=3),
        request_of("warm", prompt_of(5, 2), seed=2, temperature=1.4, top_p=0.9, routed=True),
        request_of("few", prompt_of(70, 3), seed=3, top_k=5, max_new_tokens=70),
        request_of("greedy", prompt_of(9, 4), temperature=0.0, top=2, routed=True, max_new_tokens=80),
        request_of("long", [7], seed=5, min_new_tokens=40, routed=True),
        request_of("across", prompt_of(180, 8), seed=8, min_new_tokens=30, max_new_tokens=30),
        request_of("stops", prompt_of(12, 6), seed=6, stop_token_ids=tuple(range(0, 320, 9)), min_new_tokens=7),
        request_of("text", prompt_of(12, 7), seed=7, stop=("e", "q"), min_new_tokens=3, max_new_tokens=200),
        *(request_of(f"group{i}", group, seed=20 + i, routed=True, max_new_tokens=10 + 9 * i) for i in range(4)),
    ]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_responses_are_the_same_with_right_wrong_and_no_drafts(tmp_path: pathlib.Path, family: str, dtype: str) -> None:
    weights = weights_of(save_checkpoint(tmp_path, family), getattr(torch, dtype))
    plain = Driver(tmp_path, weights, None, dtype=dtype).run(*requests())
    assert {each.ended.reason for each in plain.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert all(each.ended.speculative is None for each in plain.values())
    assert (plain["sampled"].ended.routed_experts is not None) == (family in ("qwen3_moe", "deepseek_v3"))
    future = futures(plain)
    proposers = {
        "right": Oracle(future, right=1.0),
        "partly right": Oracle(future, right=0.7, seed=1),
        "wrong": Oracle(future, right=0.0),
    }
    for (name, proposer), steps in zip(proposers.items(), (7, 3, 1), strict=True):
        driver = Driver(tmp_path, weights, lambda _, p=proposer: p, dtype=dtype, steps=steps)
        drafted = driver.run(*requests())
        assert alike(drafted) == alike(plain), name
        check_counters(driver, drafted)
        accepted = sum(each.ended.speculative.accepted_draft_tokens for each in drafted.values())
        assert (accepted > 0) == (name != "wrong")
        assert proposer.known == {}, "it was told of the end of every request"


def check_counters(driver: Driver, responses: Mapping[str, Generated]) -> None:
    """A request's counters add up to the engine's, and to what it generated."""
    assert driver.generator.drafting is not None
    (counts,) = driver.generator.drafting.state.counts
    assert (counts.policy_version, counts.draft_version) == (0, None)
    sums = [0, 0, 0]
    for response in responses.values():
        stats = response.ended.speculative
        assert stats is not None
        assert 0 <= stats.accepted_draft_tokens <= min(stats.proposed_draft_tokens, len(response.tokens))
        assert stats.verify_count <= stats.proposed_draft_tokens
        for i, n in enumerate((stats.verify_count, stats.proposed_draft_tokens, stats.accepted_draft_tokens)):
            sums[i] += n
    assert sums == [counts.verify_count, counts.proposed_draft_tokens, counts.accepted_draft_tokens]


def test_every_right_draft_saves_a_step(tmp_path: pathlib.Path) -> None:
    weights = weights_of(save_checkpoint(tmp_path, "llama"))
    request = request_of("r", prompt_of(9), seed=3, min_new_tokens=41, max_new_tokens=41)
    future = futures(Driver(tmp_path, weights, None).run(request))

    class Sure(Oracle):
        def propose(self, requests: Any, steps: int) -> list[list[int]]:
            return [self._drafts(request, steps) for request in requests]

    driver = Driver(tmp_path, weights, lambda _: Sure(future, right=1.0), steps=4)
    driver.add(request)
    steps = 0
    while not driver.generator.idle:
        driver.step()
        steps += 1
    assert steps == 1 + 40 // 5
    stats = driver.responses["r"].ended.speculative
    assert stats is not None
    assert (stats.verify_count, stats.proposed_draft_tokens, stats.accepted_draft_tokens) == (8, 32, 32)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_earlier_responses_that_come_again_are_accepted(tmp_path: pathlib.Path, family: str) -> None:
    weights = weights_of(save_checkpoint(tmp_path, family))
    asked = [
        request_of(str(i), prompt_of(8), seed=i, temperature=t, min_new_tokens=60, max_new_tokens=60, routed=True)
        for i, t in enumerate((0.0, 0.3, 1.0))
    ]
    plain = Driver(tmp_path, weights, None).run(*asked)
    earlier = [np.array(plain[name].tokens, np.int32) for name in ("0", "2")]
    driver = Driver(tmp_path, weights)
    drafted = driver.run(*(dataclasses.replace(request, earlier_responses=earlier) for request in asked))
    assert alike(drafted) == alike(plain)
    check_counters(driver, drafted)
    for name in ("0", "2"):
        stats = drafted[name].ended.speculative
        assert stats is not None
        assert stats.accepted_draft_tokens > 30


async def test_an_engine_says_what_became_of_its_drafts(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    speculation = Speculation(DraftKind.NGRAM, num_steps=3, num_draft_tokens=4)
    async with running_engine(tmp_path, weights_of(model), version=5) as engine:
        plain = await respond(engine, prompt_of(8), seed=3, min_new_tokens=24)
        assert engine.stats().speculation is None
    async with running_engine(tmp_path, weights_of(model), version=5, speculation=speculation) as engine:
        assert engine.draft is None
        assert engine.stats().speculation == SpeculationState(None, 3)
        drafted = await respond(engine, prompt_of(8), seed=3, min_new_tokens=24, earlier=[plain.tokens])
        state = engine.stats().speculation
    assert (drafted.tokens, drafted.log_probs) == (plain.tokens, plain.log_probs)
    assert state is not None
    (counts,) = state.counts
    stats = drafted.result.speculative
    assert stats == SpeculativeStats(counts.accepted_draft_tokens, counts.proposed_draft_tokens, counts.verify_count)
    assert (counts.policy_version, counts.draft_version) == (5, None)
    assert counts.accepted_draft_tokens > 10


def test_accepted_tokens_are_resumed_after_an_abort_without_loss_or_repetition(tmp_path: pathlib.Path) -> None:
    weights = weights_of(save_checkpoint(tmp_path, "qwen3_moe"))
    whole = requests()
    plain = Driver(tmp_path, weights, None).run(*whole)
    future = futures(plain)
    for steps_before in (2, 5):
        driver = Driver(tmp_path, weights, lambda _, n=steps_before: Oracle(future, seed=n), dtype="float32")
        driver.add(*whole)
        for _ in range(steps_before):
            driver.step()
        driver.generator.abort(None)
        driver.collect()
        first = dict(driver.responses)
        rest = []
        for request in whole:
            if first[request.request_id].ended.reason is FinishReason.ABORT:
                known = first[request.request_id].tokens
                sampled = {f.name: getattr(request.sampling, f.name) for f in dataclasses.fields(request.sampling)}
                rest.append(
                    request_of(
                        request.request_id, request.input_ids, resumed=known, top=request.top_token_ids,
                        routed=request.return_routed_experts, **sampled,
                    )
                )  # fmt: skip
        assert rest
        second = driver.run(*rest)
        for request in rest:
            name = request.request_id
            assert first[name].tokens + second[name].tokens == plain[name].tokens
            assert first[name].log_probs + second[name].log_probs == plain[name].log_probs
            assert second[name].ended.reason is plain[name].ended.reason
            routed, all_routed = first[name].ended.routed_experts, plain[name].ended.routed_experts
            if routed is not None and all_routed is not None:
                assert len(routed) == len(request.input_ids) - request.resumed_tokens + len(first[name].tokens) - 1
                assert routed.tolist() == all_routed[: len(routed)].tolist()
                assert second[name].alike()[-1] == plain[name].alike()[-1]


@pytest.mark.parametrize(
    ("family", "retract"),
    [
        ("qwen3_moe", False),
        ("deepseek_v3", True),
        pytest.param("qwen3", False, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", True, marks=pytest.mark.slow),
    ],
)
def test_weights_that_change_mid_response_change_it_as_without_drafts(
    tmp_path: pathlib.Path, family: str, retract: bool
) -> None:
    weights = [weights_of(save_checkpoint(tmp_path, family, seed=seed)) for seed in (1, 2, 3)]
    asked = [
        request_of(str(i), prompt_of(20 + i, i), seed=i, min_new_tokens=40, routed=True, temperature=i / 2)
        for i in range(3)
    ]
    future = futures(Driver(tmp_path, weights[0], None).run(*asked))
    driver = Driver(tmp_path, weights[0], lambda _: Oracle(future))
    driver.add(*asked)
    swaps: list[dict[str, int]] = []
    for version in (1, 2):
        for _ in range(4):
            driver.step()
        if retract:
            driver.generator.retract()
        swaps.append({each.request_id: driver.length(each.request_id) for each in asked})
        driver.load(version, weights[version])
    drafted = driver.run()
    assert driver.generator.drafting is not None
    assert [counts.policy_version for counts in driver.generator.drafting.state.counts] == [0, 1, 2]
    assert driver.generator.drafting.state.counts[0].accepted_draft_tokens > 0
    for request in asked:
        name = request.request_id
        alone = Driver(tmp_path, weights[0], None)
        alone.add(request)
        for version in (1, 2):
            while alone.length(name) < swaps[version - 1][name]:
                alone.step()
            if retract:
                alone.generator.retract()
            alone.load(version, weights[version])
        assert alone.run()[name].alike() == drafted[name].alike()
        first, second = swaps[0][name], swaps[1][name]
        assert drafted[name].ended.weight_versions == (
            VersionSpan(0, 0, first), VersionSpan(1, first, second), VersionSpan(2, second, 40)
        )  # fmt: skip


def test_requests_that_come_go_and_are_retracted_at_any_time_lose_nothing(tmp_path: pathlib.Path) -> None:
    weights = weights_of(save_checkpoint(tmp_path, "qwen3_moe"))
    plain = Driver(tmp_path, weights, None).run(*requests())
    future = futures(plain)
    for seed in range(2):
        oracle = Oracle(future, seed=seed)
        driver = Driver(
            tmp_path, weights, lambda _, o=oracle: o, steps=1 + 2 * seed, max_running_requests=3, max_prefill_tokens=17
        )
        for i, request in enumerate(requests()):
            driver.add(request)
            for _ in range((3 * i + seed) % 4):
                driver.step()
            if (i + seed) % 3 == 0:
                driver.generator.retract()
        assert alike(driver.run()) == alike(plain)


@pytest.mark.parametrize(
    ("family", "recipe"), [("qwen3_moe", Recipe(format="fp8_block")), ("llama", Recipe(format="nvfp4"))]
)
def test_quantised_weights_verify_drafts_alike(tmp_path: pathlib.Path, family: str, recipe: Recipe) -> None:
    held = weights_of(save_checkpoint(tmp_path, family))

    def driver(proposer: Any) -> Driver:
        made = Driver(tmp_path, None, proposer, recipe=recipe)
        quantised = made.generator.quantised
        assert quantised is not None
        tensors = dict(formatted(QuantisedTensors(recipe), held.items()))
        made.load(0, quantised.restored(tensors, quantised.parts_of(tensors)))
        return made

    plain = driver(None).run(*requests())
    assert alike(driver(lambda _: Oracle(futures(plain))).run(*requests())) == alike(plain)
