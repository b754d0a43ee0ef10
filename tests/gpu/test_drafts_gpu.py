"""Draft models on a GPU: what they learn there, and what the torch engine drafts with them."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from draft_kit import LAYERS, learner_of, lessons_of, save_standalone, teach, tiny_policy
from torch_drafts import Driver, request_of
from torch_engine_models import weights_of

from miles.config.speculation import DraftKind, Speculation
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import Trainable
from miles.services.trainer.drafts.language_model import TrainableLanguageModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS = 3
KINDS = (DraftKind.EAGLE3, DraftKind.STANDALONE)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    folder = tmp_path_factory.mktemp("policy")
    return folder, tiny_policy(folder)


@pytest.fixture(scope="module")
def lessons(policy: tuple[pathlib.Path, Any]) -> list[RecordedSample]:
    return lessons_of(policy[1], (EMBEDDING, 0, 1, 2))


def model_of(kind: DraftKind, policy: pathlib.Path, folder: pathlib.Path, device: torch.device) -> Trainable:
    if kind is DraftKind.STANDALONE:
        save_standalone(folder, head_dim=16)  # which the attention of GPUs has
        return TrainableLanguageModel(folder, 320, loss="kl", steps=STEPS, device=device)
    write_new_head(policy, folder)
    layers = aux_layers(str(folder), LAYERS)
    return TrainableHead(folder, layers, loss="kl", unroll_steps=STEPS, device=device)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_cpu(kind, policy, lessons, tmp_path):
    found = []
    for device in (CPU, GPU):
        model = model_of(kind, policy[0], tmp_path / device.type, device)
        result = model.learn_from(lessons[:16])
        gradients = [each.grad.flatten().cpu() for each in model.module.parameters() if each.grad is not None]
        found.append((result.loss.item(), torch.cat(gradients)))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.03)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_learns_leaves_the_gpu_and_goes_on_and_its_drafts_are_accepted(kind, policy, lessons, tmp_path):
    learner = learner_of(model_of(kind, policy[0], tmp_path / "draft", GPU))
    teach(learner, lessons, 2)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    learner.move(CPU)
    assert torch.cuda.memory_allocated() < held
    learner.move(GPU)
    found = teach(learner, lessons, 3)
    assert found[-1]["agreement"] > 0.8

    speculation = Speculation(kind, str(tmp_path / "draft"), num_steps=STEPS, adaptive=False)
    requests = [request_of(str(i), [i, 3 * i, 5], seed=i) for i in range(12)]
    weights = {name: each.cuda() for name, each in weights_of(policy[1]).items()}
    without = Driver(policy[0], weights, None, device=GPU).run(*requests)
    driver = Driver(policy[0], weights, speculation=speculation, device=GPU)
    drafting = driver.generator.drafting
    assert drafting is not None
    assert drafting.proposer.weights is not None
    drafting.proposer.weights.load(1, drafting.proposer.weights.check(dict(learner.export())))
    responses = driver.run(*requests)
    assert responses.keys() == without.keys()
    for name, response in responses.items():
        # An engine without drafts pads its steps to another number of rows, so that last bits may differ.
        (tokens, log_probs, *rest), (expected, expected_log_probs, *others) = response.alike(), without[name].alike()
        assert (tokens, rest) == (expected, others)
        assert log_probs == pytest.approx(expected_log_probs, abs=1e-4)
    counts = drafting.state.counts[-1]
    assert 1 + counts.accepted_draft_tokens / counts.verify_count > 2.5
