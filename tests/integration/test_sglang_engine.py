"""The SGLang engine against a real server on the CPU: tokens, log-probabilities, weights, pauses, aborts."""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
import torch
from sglang_kit import (
    CPU_FLAGS,
    ON_GPU,
    Response,
    have_sglang,
    largest_difference,
    options,
    reference_log_probs,
    respond,
    running,
)
from torch_engine_models import END_TOKEN, prompt_of, save_checkpoint, weights_of

from miles.precision.recipe import Recipe
from miles.services.rollout.engines.base import FinishReason, GenerationRequest, PauseMode, SamplingParams
from miles.services.rollout.engines.sglang import SglangEngine
from miles.services.rollout.engines.sglang.errors import ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.requests.payload import to_payload
from miles.services.rollout.engines.sglang.server.flags import DRAIN, KEEP_WORKSPACES
from miles.services.rollout.engines.sglang.server.probes import probe
from miles.services.rollout.engines.sglang.server.served_model import served_quantisation, write_folder
from miles.services.rollout.engines.sglang.weights.checker import checksum, drain_device
from miles.services.rollout.engines.sglang.weights.files import written
from miles.services.rollout.engines.sglang.weights.update import WeightUpdate
from miles.telemetry.tracing import spans_between
from miles.weights.base import WeightsRefused
from miles.weights.manifest import ChecksumMismatch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}
Models = list[torch.nn.Module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> Models:
    """Two models of one architecture with other weights; version v is models[v % 2]."""
    return [save_checkpoint(folder / str(seed), "qwen3", seed, initializer_range=0.1) for seed in (0, 1)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: pathlib.Path, models: Models) -> AsyncIterator[SglangEngine]:
    """Started on a folder of FP8 weights, which are served as they were trained."""
    stated = served_quantisation(Recipe(format="fp8_block"), {})
    write_folder(folder / "stated", str(folder / "0"), stated)
    flags = CPU_FLAGS | {"custom_weight_loader": [KEEP_WORKSPACES, DRAIN]}
    async with running(options(folder / "stated", folder / "logs", server_flags=flags)) as started:
        assert started.version is None
        await started.load_weights(0, weights_of(models[0]))
        yield started


async def serve(engine: SglangEngine, models: Models) -> int:
    """Load the next version; its number."""
    assert engine.version is not None
    version = engine.version + 1
    await engine.load_weights(version, weights_of(models[version % 2]))
    return version


def model_of(engine: SglangEngine, models: Models) -> torch.nn.Module:
    assert engine.version is not None
    return models[engine.version % 2]


async def under_way(
    engine: SglangEngine, seeds: Sequence[int] = range(4), group: str = ""
) -> list[asyncio.Task[Response]]:
    """A long response for each seed, with the request id rSEED; all of them have begun."""
    began = [asyncio.Event() for _ in seeds]
    tasks = [
        asyncio.create_task(
            respond(engine, prompt_of(12 + seed, seed), request_id=f"r{seed}", group=group, begun=event, **LONG)
        )
        for seed, event in zip(seeds, began, strict=True)
    ]
    async with asyncio.timeout(200):
        for event in began:
            await event.wait()
    return tasks


def check_spans(response: Response) -> None:
    """Spans are contiguous, ascend and cover the response."""
    spans = response.result.weight_versions
    assert [span.start for span in spans] == [0, *(span.end for span in spans)][: len(spans)]
    assert not spans or spans[-1].end == len(response.tokens)
    assert sorted({span.version for span in spans}) == [span.version for span in spans]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}, {"temperature": 1.3, "top_k": 20}],
    ids=["plain", "top-p", "top-k"],
)
async def test_log_probs_are_those_of_hugging_face_at_the_sampling_temperature(
    engine: SglangEngine, models: Models, sampling: dict[str, float]
) -> None:
    prompts = [prompt_of(5 + 17 * i, i) for i in range(6)]
    responses = await asyncio.gather(*(respond(engine, prompt, max_new_tokens=40, **sampling) for prompt in prompts))
    for prompt, response in zip(prompts, responses, strict=True):
        expected = reference_log_probs(model_of(engine, models), prompt, response.tokens, sampling["temperature"])
        assert largest_difference(response, expected) < 1e-5
        check_spans(response)


async def test_greedy_tokens_are_those_of_hugging_face(engine: SglangEngine, models: Models) -> None:
    prompt = prompt_of(9, 3)
    response = await respond(engine, prompt, temperature=0.0, max_new_tokens=30)
    model = model_of(engine, models)
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *response.tokens]])).logits[0, len(prompt) - 1 : -1]
    assert response.tokens == logits_TV.argmax(-1).tolist()


async def test_responses_end_where_they_should(engine: SglangEngine) -> None:
    whole = await respond(engine, prompt_of(8, 1), temperature=0.0, max_new_tokens=30, min_new_tokens=30)
    assert whole.result.reason is FinishReason.LENGTH
    assert len(whole.tokens) == 30
    stop = next(token for token in whole.tokens[5:] if token != END_TOKEN)
    expected = whole.tokens[: whole.tokens.index(stop) + 1]
    stopped = await respond(engine, prompt_of(8, 1), temperature=0.0, max_new_tokens=30, stop_token_ids=(stop,))
    assert stopped.result.reason is FinishReason.STOP
    assert stopped.tokens in (
        expected,
        whole.tokens[: whole.tokens.index(END_TOKEN) + 1 if END_TOKEN in expected else 30],
    )


async def test_a_long_response_is_streamed_and_nothing_is_lost(engine: SglangEngine) -> None:
    response = await respond(engine, prompt_of(5, 2), **LONG)
    assert len(response.tokens) == len(response.log_probs) == 400
    assert response.deltas > 3


async def test_requests_at_fault_are_refused_with_every_fault(engine: SglangEngine) -> None:
    request = GenerationRequest("bad", [1, 9999], SamplingParams(max_new_tokens=1000, top_p=0.0))
    with pytest.raises(ValueError, match=r"9999.*exceed.*top_p"):
        await anext(engine.generate(request))


async def test_a_request_that_sglang_refuses_ends_its_own_group_alone(engine: SglangEngine) -> None:
    async def tokens(group: str, rid: str, prompt: list[int]) -> int:
        request = GenerationRequest(rid, prompt, SamplingParams(max_new_tokens=4, min_new_tokens=4))
        payload = to_payload(request, rid, cache_key="none", seeded=False)
        events = [event async for event in engine.replicas[0].batches.generate(group, payload)]
        return sum(len(event["output_ids"]) for event in events)

    asked = [("g", prompt_of(8, 0)), ("g", prompt_of(9, 1)), ("h", prompt_of(100_000, 2)), ("h", prompt_of(7, 3))]
    outcomes = await asyncio.gather(
        *(tokens(group, f"refused-{i}", prompt) for i, (group, prompt) in enumerate(asked)), return_exceptions=True
    )
    assert outcomes[:2] == [4, 4]
    assert all(isinstance(outcome, ValueError | ServerRefused) for outcome in outcomes[2:])


async def test_samples_of_a_group_share_their_prompt(engine: SglangEngine) -> None:
    prompt = prompt_of(120, 77)
    first = await respond(engine, prompt, max_new_tokens=4, group="g")
    assert first.result.cached_prompt_tokens == 0
    others = await asyncio.gather(*(respond(engine, prompt, max_new_tokens=4, group="g") for _ in range(3)))
    assert all(other.result.cached_prompt_tokens >= 100 for other in others)


async def test_an_update_is_served_and_proven(engine: SglangEngine, models: Models) -> None:
    for _ in range(2):
        version = await serve(engine, models)
        response = await respond(engine, prompt_of(20, version))
        assert [span.version for span in response.result.weight_versions] == [version]
        expected = reference_log_probs(models[version % 2], prompt_of(20, version), response.tokens)
        assert largest_difference(response, expected) < 1e-5
        served = await engine.weight_bytes()
        assert served.keys() == weights_of(models[0]).keys()


async def test_staged_weights_are_served_once_they_are_loaded_and_not_in_place_of_others(
    engine: SglangEngine, models: Models
) -> None:
    assert engine.version is not None
    before, (first, second) = engine.version, [weights_of(model) for model in models]
    await engine.stage_weights(second)
    assert engine.version == before
    for version, tensors in ((before + 2 - before % 2, first), (before + 3 - before % 2, second)):
        await engine.load_weights(version, tensors)
        response = await respond(engine, prompt_of(20, version))
        expected = reference_log_probs(models[version % 2], prompt_of(20, version), response.tokens)
        assert largest_difference(response, expected) < 1e-5
        await engine.stage_weights(second)


async def test_an_update_without_requests_is_three_calls(engine: SglangEngine, models: Models) -> None:
    await respond(engine, prompt_of(20, 1))
    for mode in (None, PauseMode.RETRACT):
        began = time.time_ns()
        if mode is not None:
            await engine.pause(mode)
        version = await serve(engine, models)
        if mode is not None:
            await engine.resume()
        spans = spans_between(began, time.time_ns())
        calls = [span.detail for span in spans if span.name == "call SGLang"]
        assert calls == ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
        response = await respond(engine, prompt_of(20, version))
        assert [span.version for span in response.result.weight_versions] == [version]
        expected = reference_log_probs(models[version % 2], prompt_of(20, version), response.tokens)
        assert largest_difference(response, expected) < 1e-5


async def test_a_server_starts_without_the_weights_of_a_folder_in_another_format(
    engine: SglangEngine, folder: pathlib.Path
) -> None:
    model = engine.replicas[0].model
    assert not model.has_weights
    served = await engine.replicas[0].api.get("/server_info", 60.0)
    assert (served["model_path"], served["load_format"]) == (model.folder, "dummy")
    wrong = options(
        *(folder / "stated", folder), addresses=(engine.replicas[0].api.address,), recipe=Recipe(format="fp8_block")
    )
    with pytest.raises(ServerUnstartable, match=r"to hold weights in float32, and versions come in fp8_block"):
        await SglangEngine(wrong).start()


async def test_a_checksum_of_nothing_waits_for_the_device(engine: SglangEngine) -> None:
    api = engine.replicas[0].api
    await drain_device(api, 60.0)
    assert await checksum(api, "all", 60.0) == await checksum(api, "all", 60.0)


async def test_weights_that_no_update_brought_are_found(
    engine: SglangEngine, models: Models, tmp_path: pathlib.Path
) -> None:
    await serve(engine, models)
    api = engine.replicas[0].api
    name, tensor = next(iter(weights_of(models[0]).items()))
    async with written(tmp_path, "weights-", "x", [[(name, tensor + 1e-3)]]) as folder:
        await WeightUpdate(api, None, "all", 60.0, repacks=True, drains=True).from_files(folder)
    assert not list(tmp_path.glob("weights-*"))
    with pytest.raises(ChecksumMismatch, match="did not hold"):
        await engine.weight_bytes()
    await serve(engine, models)
    await engine.weight_bytes()


async def test_weights_that_do_not_fit_are_refused_before_anything_changes(
    engine: SglangEngine, models: Models
) -> None:
    version, good = engine.version, weights_of(models[0])
    name = next(iter(good))
    for bad in (
        {key: value for key, value in good.items() if key != name},
        good | {"extra.weight": torch.zeros(1)},
        good | {name: torch.zeros(3)},
    ):
        with pytest.raises(WeightsRefused, match="do not fit the model"):
            await engine.load_weights(99, bad)
    assert engine.version == version
    await engine.weight_bytes()


async def test_an_update_in_place_keeps_requests_and_gives_new_ones_nothing_stale(
    engine: SglangEngine, models: Models
) -> None:
    prompt = prompt_of(100, 5)
    await respond(engine, prompt, max_new_tokens=4)
    old = engine.version
    tasks = await under_way(engine)
    version = await serve(engine, models)
    fresh = await respond(engine, prompt, max_new_tokens=20)
    assert fresh.result.cached_prompt_tokens == 0
    assert largest_difference(fresh, reference_log_probs(models[version % 2], prompt, fresh.tokens)) < 1e-5
    for response in await asyncio.gather(*tasks):
        assert len(response.tokens) == 400
        check_spans(response)
        assert [span.version for span in response.result.weight_versions] == [old, version]


async def test_a_version_with_the_number_of_another_finds_nothing_that_the_other_computed(
    engine: SglangEngine, models: Models
) -> None:
    prompt = prompt_of(100, 7)
    version = await serve(engine, models)
    await respond(engine, prompt, max_new_tokens=4)
    await engine.pause(PauseMode.RETRACT)
    other = models[(version + 1) % 2]
    await engine.load_weights(version, weights_of(other))
    await engine.resume()
    fresh = await respond(engine, prompt, max_new_tokens=20)
    assert fresh.result.cached_prompt_tokens == 0
    assert largest_difference(fresh, reference_log_probs(other, prompt, fresh.tokens)) < 1e-5
    await engine.load_weights(version, weights_of(models[version % 2]))


async def test_a_retracting_update_computes_requests_anew(engine: SglangEngine, models: Models) -> None:
    old = engine.version
    assert old is not None
    tasks = await under_way(engine)
    await engine.pause(PauseMode.RETRACT)
    version = await serve(engine, models)
    await engine.resume()
    for i, response in enumerate(await asyncio.gather(*tasks)):
        assert len(response.tokens) == 400
        check_spans(response)
        before, after = response.result.weight_versions
        assert (before.version, after.version) == (old, version)
        for span in (before, after):
            model = models[span.version % 2]
            expected = reference_log_probs(model, prompt_of(12 + i, i), response.tokens, impossible=[END_TOKEN])
            expected = expected[span.start : span.end]
            found = torch.tensor(response.log_probs[span.start : span.end], dtype=torch.float64)
            assert (found - expected).abs().max() < 1e-5, f"{span} of {response.result.weight_versions}"


async def test_an_aborting_update_hands_requests_back_and_they_are_resumed(
    engine: SglangEngine, models: Models
) -> None:
    tasks = await under_way(engine)
    await engine.pause(PauseMode.ABORT)
    begun = await asyncio.gather(*tasks)
    version = await serve(engine, models)
    await engine.resume()
    for i, part in enumerate(begun):
        assert part.result.reason is FinishReason.ABORT
        assert 0 < len(part.tokens) < 400
        check_spans(part)
        rest = await respond(
            engine, [*prompt_of(12 + i, i), *part.tokens], resumed_tokens=len(part.tokens), max_new_tokens=400
        )
        assert [span.version for span in rest.result.weight_versions] == [version]
        assert rest.result.reason is FinishReason.STOP or len(part.tokens) + len(rest.tokens) == 400
        expected = reference_log_probs(models[version % 2], [*prompt_of(12 + i, i), *part.tokens], rest.tokens)
        assert largest_difference(rest, expected) < 1e-5


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_nothing_decodes_during_a_pause(engine: SglangEngine, mode: PauseMode) -> None:
    tasks = await under_way(engine)
    await engine.pause(mode)
    await asyncio.sleep(0.3)  # what was sent before the pause arrives
    before = engine.stats().generated_tokens
    late = asyncio.create_task(respond(engine, prompt_of(5), max_new_tokens=3))
    await asyncio.sleep(0.5)
    assert engine.stats().generated_tokens == before
    assert engine.stats().waiting_requests == 1
    await engine.resume()
    assert len((await late).tokens) <= 3
    assert all(len(response.tokens) == 400 for response in await asyncio.gather(*tasks))


@pytest.mark.parametrize("group", ["", "together"])
async def test_requests_are_aborted_one_by_one_and_all_at_once(engine: SglangEngine, group: str) -> None:
    tasks = await under_way(engine, (1, 10, 11, 2), group)
    await engine.abort(["r1"])  # no other whose id begins with r1
    assert (await tasks[0]).result.reason is FinishReason.ABORT
    assert not any(task.done() for task in tasks[1:])
    await engine.abort()
    for response in await asyncio.gather(*tasks[1:]):
        assert response.result.reason is FinishReason.ABORT
        assert len(response.tokens) == len(response.log_probs) > 0
    assert engine.stats().running_requests == 0


async def test_an_abort_right_after_the_request_is_not_lost(engine: SglangEngine) -> None:
    task = asyncio.create_task(respond(engine, prompt_of(9), request_id="quick", **LONG))
    await asyncio.sleep(0)
    await engine.abort(["quick"])
    assert (await asyncio.wait_for(task, 30)).result.reason is FinishReason.ABORT


async def test_leaving_a_response_early_frees_its_place(engine: SglangEngine) -> None:
    stays = asyncio.create_task(respond(engine, prompt_of(8), group="g", max_new_tokens=40, min_new_tokens=40))
    request = GenerationRequest("left", prompt_of(9), SamplingParams(**LONG), group="g")
    stream = engine.generate(request)
    await anext(stream)
    await stream.aclose()
    assert engine.stats().running_requests <= 1
    assert len((await stays).tokens) == 40
    async with asyncio.timeout(120):
        while probe(engine.replicas[0].api.address).running:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert len((await respond(engine, prompt_of(9), max_new_tokens=3)).tokens) <= 3


async def test_an_engine_attaches_to_a_running_server_and_loads_files(
    engine: SglangEngine, models: Models, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    address = engine.replicas[0].api.address
    given = options(folder / "0", tmp_path, addresses=(address,), weight_path="disk", weight_dir=tmp_path, name="other")
    async with running(given) as attached:
        await attached.load_weights(50, weights_of(models[1]))
        response = await respond(attached, prompt_of(14))
        assert [span.version for span in response.result.weight_versions] == [50]
        assert largest_difference(response, reference_log_probs(models[1], prompt_of(14), response.tokens)) < 1e-5
        await attached.weight_bytes()
    assert list(tmp_path.glob("*weights*")) == []
    await engine.load_weights(51, weights_of(models[1]))
    assert (await respond(engine, prompt_of(14), max_new_tokens=2)).result.weight_versions[0].version == 51
