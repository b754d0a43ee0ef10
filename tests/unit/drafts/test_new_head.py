from __future__ import annotations

import json
import pathlib

import pytest
import torch
from draft_kit import LAYERS, tiny_policy
from safetensors.torch import load_file, save_file

from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import aux_layers
from miles.drafts.vocabulary import read_vocabulary
from miles.services.trainer.convert import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_policy(folder)
    return folder


def load(folder: pathlib.Path) -> TrainableHead:
    layers = aux_layers(str(folder), LAYERS)
    return TrainableHead(folder, layers, loss="kl", unroll_steps=2, device=CPU)


def test_a_new_head_has_the_policys_sizes_and_is_the_same_for_a_seed(policy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_new_head(policy, tmp_path / name, seed)
    first, same, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    config = json.loads((tmp_path / "a" / "config.json").read_text())

    assert (config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]) == (32, 320, 320)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert all(first[name].equal(same[name]) for name in first)
    assert not first["fc.weight"].equal(other["fc.weight"])
    assert not any(name.endswith(("embed_tokens.weight", "d2t")) for name in first)


def test_a_head_is_written_as_it_was_read(policy, tmp_path):
    write_new_head(policy, tmp_path / "head", layers=2, draft_vocab=40)
    load(tmp_path / "head").save(tmp_path / "again", torch.float32)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("head", "again"))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("head", "again")]
    assert configs[0] == configs[1]


def test_a_part_of_the_vocabulary_has_the_first_tokens_and_the_end_of_responses(policy, tmp_path):
    write_new_head(policy, tmp_path / "head", draft_vocab=40)
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    vocabulary = read_vocabulary(tensors, 40, 320)
    assert vocabulary.ids_V.tolist() == [*range(39), 256]
    assert tensors["t2d"].nonzero()[:, 0].equal(vocabulary.ids_V)
    assert tensors["lm_head.weight"].shape[0] == 40
    assert vocabulary.draft_ids(torch.tensor([0, 256, 39])).tolist() == [0, 39, -1]
    assert vocabulary.policy_ids(torch.tensor([0, 39])).tolist() == [0, 256]


def test_the_authors_names_of_a_head_are_kept(policy, tmp_path):
    write_new_head(policy, tmp_path / "head")
    file = tmp_path / "head" / "model.safetensors"
    theirs = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in load_file(file).items()}
    save_file(theirs, file)
    head = load(tmp_path / "head")
    assert {head.published_name(name) for name, _ in head.module.named_parameters()} == theirs.keys()


def test_weights_of_other_shapes_are_refused(policy, tmp_path):
    write_new_head(policy, tmp_path / "head")
    file = tmp_path / "head" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "fc.weight": tensors["fc.weight"][:, 1:].contiguous()}, file)
    with pytest.raises(ValueError, match=r"fc.weight is of shape \(32, 95\)"):
        load(tmp_path / "head")


def test_the_command_writes_a_head(policy, tmp_path, capsys):
    arguments = ["new-draft", "--hf-checkpoint", str(policy), "--save", str(tmp_path / "head"), "--dtype", "bfloat16"]
    assert main([*arguments, "--layers", "2", "--draft-vocab", "100"]) == 0
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (100, 32)
    assert tensors["layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    arguments[4] = str(tmp_path / "other")
    assert main([*arguments, "--draft-vocab", "321"]) == 1
    assert "the policy has 320 tokens" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
