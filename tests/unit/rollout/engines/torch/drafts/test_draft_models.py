from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from draft_kit import LAYERS, TOKENS, learner_of, lessons_of, save_standalone, teach, tiny_policy
from torch_drafts import Driver, Generated, request_of
from torch_engine_models import weights_of

from miles.config.speculation import DraftKind, Speculation
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.services.trainer.drafts.language_model import TrainableLanguageModel
from miles.weights.base import WeightsRefused

STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    folder = tmp_path_factory.mktemp("policy")
    return folder, tiny_policy(folder)


@pytest.fixture(scope="module", params=[DraftKind.EAGLE3, DraftKind.STANDALONE])
def draft(
    request: pytest.FixtureRequest, policy: tuple[pathlib.Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Speculation, dict[str, torch.Tensor], float]:
    """How to draft with an untrained model of each kind, the weights of the same one trained, and the tokens of a
    verification that its learner predicts of responses that it has not seen."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    if request.param is DraftKind.EAGLE3:
        write_new_head(policy[0], folder, draft_vocab=TOKENS + 1)
        layers = aux_layers(str(folder), LAYERS)
        learner = learner_of(TrainableHead(folder, layers, loss="kl", unroll_steps=STEPS, device=CPU))
        teach(learner, lessons_of(policy[1], (EMBEDDING, *layers)), 4)
    else:
        save_standalone(folder)
        learner = learner_of(TrainableLanguageModel(folder, 320, loss="kl", steps=STEPS, device=CPU))
        teach(learner, lessons_of(policy[1], ()), 4)
    speculation = Speculation(request.param, str(folder), num_steps=STEPS, adaptive=False)
    trained = {name: each.clone() for name, each in learner.export()}
    unseen = lessons_of(policy[1], (EMBEDDING, 0, 1, 2), seed=1)
    return speculation, trained, next(learner.learn(unseen))["accept_length"]


def generate(
    policy: tuple[pathlib.Path, Any], speculation: Speculation | None, weights: dict[str, torch.Tensor] | None, **o: Any
) -> tuple[dict[str, Generated], Any]:
    """Responses of several lengths, three of a prompt that is one token long or longer than a step's prefill."""
    options = {"speculation": speculation} if speculation is not None else {"proposer": None}
    driver = Driver(policy[0], weights_of(policy[1]), **options, max_running_requests=4, **o)
    if weights is not None:
        target = driver.generator.drafting.proposer.weights  # type: ignore[union-attr]
        assert target is not None
        target.load(3, target.check(weights))
    prompts = [[5], list(range(64)) * 5, [9, 8, 7], list(range(2, 20))]
    requests = [
        request_of(f"{i}-{j}", prompt, seed=10 * i + j, max_new_tokens=20 + 11 * j)
        for i, prompt in enumerate(prompts)
        for j in range(3)
    ]
    return driver.run(*requests), driver.generator


@pytest.fixture(scope="module")
def without(policy: tuple[pathlib.Path, Any]) -> dict[str, Any]:
    """Responses by a policy without drafts."""
    return {name: each.alike() for name, each in generate(policy, None, None)[0].items()}


def test_responses_are_the_same_with_drafts_and_most_of_them_are_accepted(policy, draft, without):
    speculation, trained, predicted = draft
    responses, generator = generate(policy, speculation, trained)

    assert {name: each.alike() for name, each in responses.items()} == without
    counts = generator.drafting.state.counts[-1]
    assert counts.draft_version == 3
    assert 1 + counts.accepted_draft_tokens / counts.verify_count > 2.5  # of 4 at most
    assert 1 + counts.accepted_draft_tokens / counts.verify_count == pytest.approx(predicted, rel=0.2)


def test_drafts_of_an_untrained_model_are_wrong_and_responses_are_the_same(policy, draft, without):
    responses, generator = generate(policy, draft[0], None)

    assert {name: each.alike() for name, each in responses.items()} == without
    counts = generator.drafting.state.counts[-1]
    assert counts.draft_version is None
    assert 1 + counts.accepted_draft_tokens / counts.verify_count < 1.5


def test_drafts_go_on_after_requests_lost_their_cache(policy, draft):
    speculation, trained, _ = draft
    driver = Driver(policy[0], weights_of(policy[1]), speculation=speculation)
    target = driver.generator.drafting.proposer.weights  # type: ignore[union-attr]
    assert target is not None
    driver.add(*(request_of(str(i), [7, i], seed=i) for i in range(6)))
    for _ in range(4):
        driver.step()
    target.load(1, target.check(trained))
    driver.generator.retract()
    while not driver.generator.idle:
        driver.step()
    driver.collect()

    without = Driver(policy[0], weights_of(policy[1]), None).run(
        *(request_of(str(i), [7, i], seed=i) for i in range(6))
    )
    assert [driver.responses[str(i)].tokens for i in range(6)] == [without[str(i)].tokens for i in range(6)]
    counts = driver.generator.drafting.state.counts[-1]  # type: ignore[union-attr]
    assert 1 + counts.accepted_draft_tokens / counts.verify_count > 2.5


def test_weights_that_do_not_fit_are_refused_and_those_served_stay(policy, draft):
    speculation, trained, _ = draft
    driver = Driver(policy[0], weights_of(policy[1]), speculation=speculation)
    target = driver.generator.drafting.proposer.weights  # type: ignore[union-attr]
    assert target is not None
    target.load(1, target.check(trained))
    served = target.served()
    name = next(iter(trained))

    for wrong in (
        {key: value for key, value in trained.items() if key != name},
        {**trained, name: trained[name][:-1]},
        {**trained, name: trained[name].bfloat16()},
        {**trained, "more.weight": trained[name]},
    ):
        with pytest.raises(WeightsRefused):
            target.check(wrong)

    assert target.version == 1
    assert {key: value.data_ptr() for key, value in served.items()} == {k: v.data_ptr() for k, v in trained.items()}
