from __future__ import annotations

import pathlib
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file

from miles.services.rollout.engines.sglang.speculative.draft import DraftModel, own_parameters
from miles.weights.base import WeightsRefused

DRAFT = {"model.layers.0.w": torch.ones(2, 3), "model.embed_tokens.weight": torch.ones(8, 3)}
POLICY_SHAPES = {"model.embed_tokens.weight": (8, 3), "model.layers.0.w": (2, 3)}


class Servers:
    """What a draft model asks of its engine."""

    def __init__(self) -> None:
        self.loads: list[Mapping[str, torch.Tensor]] = []
        self.broken = False

    async def load(self, tensors: Mapping[str, torch.Tensor]) -> float:
        if self.broken:
            raise RuntimeError("out of memory")
        self.loads.append(tensors)
        return 0.25

    async def verify(self) -> None:
        if self.broken:
            raise RuntimeError("another draft")


@pytest.fixture
def servers() -> Servers:
    return Servers()


@pytest.fixture
def draft(servers: Servers, tmp_path: pathlib.Path) -> DraftModel:
    save_file(DRAFT, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return DraftModel(torch.device("cpu"), str(tmp_path), servers.load, servers.verify)


async def test_a_draft_has_versions_of_its_own(draft: DraftModel, servers: Servers) -> None:
    assert draft.version is None
    assert await draft.load_weights(7, DRAFT) == 0.25
    assert draft.version == 7
    assert servers.loads == [DRAFT]
    assert await draft.weight_bytes() == DRAFT


async def test_after_a_failed_load_a_draft_holds_no_version(draft: DraftModel, servers: Servers) -> None:
    await draft.load_weights(7, DRAFT)
    servers.broken = True
    with pytest.raises(RuntimeError):
        await draft.load_weights(8, DRAFT)
    assert draft.version is None
    with pytest.raises(RuntimeError):
        await draft.weight_bytes()


async def test_weights_of_another_model_are_refused_before_anything_changes(
    draft: DraftModel, servers: Servers
) -> None:
    await draft.load_weights(7, DRAFT)
    for bad in ({**DRAFT, "x": torch.ones(1)}, {**DRAFT, "model.layers.0.w": torch.ones(3, 2)}):
        with pytest.raises(WeightsRefused, match="do not fit the draft model"):
            await draft.load_weights(8, bad)
    assert draft.version == 7
    assert len(servers.loads) == 1


async def test_a_version_that_leaves_something_out_is_refused(draft: DraftModel, servers: Servers) -> None:
    with pytest.raises(WeightsRefused, match=r"layers.0.w is missing"):
        await draft.load_weights(7, {"model.embed_tokens.weight": DRAFT["model.embed_tokens.weight"]})
    await draft.load_weights(8, {"model.layers.0.w": DRAFT["model.layers.0.w"]})
    assert draft.version == 8


async def test_a_head_goes_by_each_name_that_sglang_knows(servers: Servers, tmp_path: pathlib.Path) -> None:
    save_file({"midlayer.w": torch.ones(2, 3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head = DraftModel(torch.device("cpu"), str(tmp_path), servers.load, servers.verify)
    for version, name in enumerate(("midlayer.w", "layers.0.w", "model.layers.0.w")):
        await head.load_weights(version, {name: torch.ones(2, 3)})
    assert len(servers.loads) == 3
    with pytest.raises(WeightsRefused, match=r"layers.1.w has shape"):
        await head.load_weights(4, {"layers.1.w": torch.ones(2, 3)})


HEAD = {**DRAFT, "lm_head.weight": torch.ones(8, 3), "d2t": torch.zeros(8), "t2d": torch.ones(8)}


@pytest.mark.parametrize(
    ("algorithm", "config", "own"),
    [
        ("EAGLE3", {"draft_vocab_size": 8}, {"model.layers.0.w", "lm_head.weight"}),
        ("EAGLE3", {"draft_vocab_size": None}, {"model.layers.0.w"}),
        ("EAGLE3", {"draft_vocab_size": 8, "tie_word_embeddings": True}, {"model.layers.0.w"}),
        ("eagle", {"draft_vocab_size": 8}, {"model.layers.0.w"}),
        ("STANDALONE", {}, set(HEAD)),
    ],
)
def test_what_is_the_policys_own_memory_or_read_only_once_is_left_alone(
    algorithm: str, config: dict[str, object], own: set[str]
) -> None:
    assert set(own_parameters(HEAD, algorithm, config, POLICY_SHAPES)) == own


def test_a_smaller_head_is_the_drafts_own() -> None:
    head = {"lm_head.weight": torch.ones(4, 3), "model.embed_tokens.weight": torch.ones(8, 2)}
    assert set(own_parameters(head, "EAGLE", {}, POLICY_SHAPES)) == set(head)
