from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from draft_kit import LAYERS, TOKENS, learner_of, lessons_of, record, save_standalone, teach, tiny_policy
from recorded import random_sample
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, MambaConfig, MambaForCausalLM

from miles.drafts import head_pass
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import Trainable
from miles.services.trainer.drafts.language_model import TrainableLanguageModel
from miles.services.trainer.drafts.learner import DraftLearner, batches

CPU = torch.device("cpu")
READ = (0, 1, 2)
KINDS = ("eagle3", "part of the vocabulary", "standalone")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    folder = tmp_path_factory.mktemp("policy")
    return folder, tiny_policy(folder)


@pytest.fixture(scope="module")
def lessons(policy: tuple[pathlib.Path, Any]) -> list[RecordedSample]:
    return lessons_of(policy[1], (EMBEDDING, *READ))


def model_of(kind: str, policy: pathlib.Path, folder: pathlib.Path, loss: str = "kl") -> Trainable:
    if kind == "standalone":
        save_standalone(folder)
        return TrainableLanguageModel(folder, 320, loss=loss, steps=3, device=CPU)
    write_new_head(policy, folder, draft_vocab=TOKENS + 1 if kind == KINDS[1] else None)
    assert aux_layers(str(folder), LAYERS) == READ
    return TrainableHead(folder, READ, loss=loss, unroll_steps=3, device=CPU)


@pytest.mark.parametrize(("kind", "loss"), [("eagle3", "kl"), (KINDS[1], "kl"), ("eagle3", "ce"), ("standalone", "kl")])
def test_a_draft_from_nothing_learns_to_agree_with_the_policy(kind, loss, policy, lessons, tmp_path):
    learner = learner_of(model_of(kind, policy[0], tmp_path / "draft", loss))
    found = teach(learner, lessons, 4)
    assert found[0]["agreement"] < 0.1
    assert found[0]["accept_length"] < 1.3
    assert found[-1]["agreement"] > 0.8
    assert found[-1]["accept_length"] > 2.5
    assert found[-1]["loss"] < found[0]["loss"] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_goes_on_from_its_state_as_if_nothing_had_happened(kind, policy, tmp_path):
    samples = record(policy[1], samples=12, prompt=5, response=20, layers=(EMBEDDING, *READ), seed=0)
    one, two = (learner_of(model_of(kind, policy[0], tmp_path / name), batch_tokens=100) for name in "ab")
    assert len(list(one.learn(samples))) == 3
    saved = {name: tensor.clone() for name, tensor in one.state().items()}
    two.load_state(saved)
    assert [dict(each) for each in one.learn(samples)] == [dict(each) for each in two.learn(samples)]
    assert all(tensor.equal(two.state()[name]) for name, tensor in one.state().items())


def test_a_learner_is_interrupted_between_steps_and_moved_there(policy, tmp_path):
    samples = record(policy[1], samples=12, prompt=5, response=20, layers=(EMBEDDING, *READ), seed=0)
    one, two = (learner_of(model_of("eagle3", policy[0], tmp_path / name), batch_tokens=100) for name in "ab")
    for _ in one.learn(samples):
        one.move(CPU)
    steps = two.learn(samples)
    next(steps)
    assert two.optimizer_steps == 1
    for _ in steps:
        pass
    assert all(tensor.equal(two.state()[name]) for name, tensor in one.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_model_is_refused_and_nothing_changed(kind, policy, tmp_path):
    learner = learner_of(model_of(kind, policy[0], tmp_path / "draft"))
    state = learner.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    name = next(each for each in state if each.startswith("exp_avg."))
    for wrong in (
        {**state, name: state[name][:1]},
        {k: v for k, v in state.items() if k != name},
        {**state, "x": state[name]},
    ):
        with pytest.raises(ValueError, match=r"of another draft model: (exp_avg\.|x)"):
            learner.load_state({k: v + 1 if k.startswith("weight.") else v for k, v in wrong.items()})
    assert all(tensor.equal(before[key]) for key, tensor in learner.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_engines_get_has_the_names_of_the_folder_and_makes_one_with_what_is_not_trained(
    kind, policy, lessons, tmp_path
):
    learner = learner_of(model_of(kind, policy[0], tmp_path / "draft"))
    list(learner.learn(lessons[:4]))
    exported = dict(learner.export())
    assert [(name, t.dtype, tuple(t.shape)) for name, t in exported.items()] == list(learner.layout())
    learner.save(tmp_path / "trained")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("draft", "trained"))
    assert before.keys() - exported.keys() == ({"d2t", "t2d"} if kind == KINDS[1] else set())
    assert after.keys() == before.keys()
    assert all(after[name].equal(tensor) for name, tensor in exported.items())


def test_samples_with_nothing_to_learn_are_left_out(policy, tmp_path):
    learner = learner_of(model_of("eagle3", policy[0], tmp_path / "draft"))
    samples = record(policy[1], samples=2, prompt=5, response=6, layers=(EMBEDDING, *READ), seed=0)
    samples[0].loss_mask_R[:] = False
    assert [each["tokens"] for each in learner.learn(samples)] == [6]
    assert list(learner.learn(samples[:1])) == []


def test_masked_tokens_teach_nothing(policy, tmp_path):
    """Whatever the policy said there."""
    one, two = (learner_of(model_of("standalone", policy[0], tmp_path / name)) for name in "ab")
    samples = [record(policy[1], samples=3, prompt=5, response=20, layers=(), seed=0) for _ in range(2)]
    for i, learner in enumerate((one, two)):
        for sample in samples[i]:
            sample.loss_mask_R[4:9] = False
            sample.top_tokens_RK[4:9] = i
        list(learner.learn(samples[i]))
    assert all(tensor.equal(two.state()[name]) for name, tensor in one.state().items())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_language_model_learns_chunk_by_chunk_what_it_would_at_once(scaled, policy, tmp_path, monkeypatch):
    monkeypatch.setitem(head_pass.CHUNK_ELEMENTS, "cpu", 7 * 320)
    if scaled:
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=320, logits_scaling=3.0)).save_pretrained(tmp_path)
    else:
        save_standalone(tmp_path)
    model = TrainableLanguageModel(tmp_path, 320, loss="ce", steps=3, device=CPU)
    module: Any = model.module
    rows: list[int] = []
    head = module.get_output_embeddings()
    head.register_forward_hook(lambda _, given, made: rows.append(made[..., 0].numel()))
    samples = record(policy[1], samples=3, prompt=5, response=20, layers=(), seed=0)
    samples[1].loss_mask_R[4:9] = False
    found = model.learn_from(samples)
    assert (max(rows) > 7) == scaled

    alone: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    losses = []
    for sample in samples:
        logits_RV = alone(input_ids=sample.tokens_T[None]).logits[0, sample.prompt_length - 1 : -1]
        sampled_R = sample.tokens_T[sample.prompt_length :].long()
        losses.append(torch.nn.functional.cross_entropy(logits_RV, sampled_R, reduction="none")[sample.loss_mask_R])
    mean = torch.cat(losses).mean()
    mean.backward()
    assert found.loss.item() == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_model_whose_rows_see_other_samples_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 320}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*choose a draft model whose layers all have attention"):
        TrainableLanguageModel(tmp_path, 320, loss="ce", steps=3, device=CPU)


def test_batches_have_about_as_many_tokens_and_every_sample_once():
    generator = torch.Generator().manual_seed(0)
    samples = [random_sample(generator, length=length, prompt=2) for length in (5, 9, 30, 7, 8, 4, 12, 6, 11, 5)]
    dealt = list(batches(samples, 40))
    assert [id(sample) for batch in dealt for sample in batch] == [id(sample) for sample in samples]
    assert [sum(len(sample.tokens_T) for sample in batch) for batch in dealt] == [44, 19, 34]
    assert [len(batch) for batch in batches(samples, 1)] == [1] * 10


def test_every_pass_takes_the_samples_again_and_the_first_says_how_good_the_draft_is(policy, tmp_path):
    samples = record(policy[1], samples=4, prompt=5, response=20, layers=(EMBEDDING, *READ), seed=0)
    learner: DraftLearner = learner_of(model_of("eagle3", policy[0], tmp_path / "draft"), batch_tokens=50, passes=3)
    found = list(learner.learn(samples))
    assert len(found) == 6
    assert ["agreement" in each for each in found] == [True] * 2 + [False] * 4
    assert all({"grad_norm", "tokens"} <= each.keys() for each in found)
