from __future__ import annotations

import pathlib

import pytest
import torch

from examples.smollm2_chain_sum import enlarge_head
from examples.smollm2_chain_sum.enlarge_head import enlarged_head
from miles.config.checks.json_file import read_json_object
from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.eagle3_training import load_head
from miles.drafts.folder import read_tensors
from miles.drafts.new_head import write_new_head
from tests.support.tiny_llama import dense_model

SMALL, LARGE, ROWS = 36, 96, 12
SIZES = {"hidden": LARGE, "heads": 8, "kv_heads": 2}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    policy, head = tmp_path / "policy", tmp_path / "head"
    dense_model(num_hidden_layers=6).save_pretrained(policy)
    write_new_head(policy, head, layers=2, draft_vocab=20)
    return head


def drafts(head: Eagle3Head, features_NF: torch.Tensor, embeds_ND: torch.Tensor) -> torch.Tensor:
    """Logits, each row attending to those up to it."""

    def attend(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    with torch.no_grad():
        return head.logits(head(head.fc(features_NF), embeds_ND, torch.arange(len(embeds_ND)), attend))


def test_the_large_head_drafts_the_same(folder: pathlib.Path) -> None:
    config, tensors = read_json_object(folder / "config.json"), read_tensors(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + 0.1 * torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    large_config, large_tensors = enlarged_head(config, tensors, **SIZES)
    hidden = torch.randn(3, ROWS, SMALL, generator=generator)
    embeds = torch.randn(ROWS, SMALL, generator=generator)
    wide = torch.nn.functional.pad(hidden, (0, LARGE - SMALL))
    small, _ = load_head(config, tensors, torch.float32)
    large, _ = load_head(large_config, large_tensors, torch.float32)
    expected = drafts(small, torch.cat(list(hidden), -1), embeds)
    found = drafts(large, torch.cat(list(wide), -1), torch.nn.functional.pad(embeds, (0, LARGE - SMALL)))
    assert expected.abs().max() > 1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(large_tensors[name], tensors[name]) for name in ("d2t", "t2d"))


def test_the_folder_is_written_with_all_that_the_small_one_has(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "large"
    sizes = ["--hidden", str(LARGE), "--heads", "8", "--kv-heads", "2"]
    enlarge_head.main(["--head", str(folder), "--out", str(out), *sizes])
    small, large = (read_json_object(each / "config.json") for each in (folder, out))
    assert {key for key in small if small[key] != large[key]} == {
        "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
    }  # fmt: skip
    assert read_tensors(out).keys() == read_tensors(folder).keys()


@pytest.mark.parametrize("sizes", [{"hidden": 24}, {"heads": 9}, {"heads": 4}, {"kv_heads": 8}])
def test_sizes_that_cannot_hold_the_head_are_refused(folder: pathlib.Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot hold the head's \(36, 3, 1\)"):
        enlarged_head(read_json_object(folder / "config.json"), {}, **SIZES | sizes)
