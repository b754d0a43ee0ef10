"""The two forms of a model's tensors are each other's inverse, and the checkpoint form is what transformers saves."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron_models import FAMILIES, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.weights.naming.conversion import Named
from miles.weights.naming.model_tensors import once, read_model_tensors, shared_by_mtp


def module_form(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's model as its modules hold them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in once(model.state_dict(keep_vars=True)).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_bytes_are_those_of_the_files(tmp_path: pathlib.Path, family: str) -> None:
    folder = write_model(family, tmp_path / "model")
    files, held = load_file(folder / "model.safetensors"), module_form(folder)
    tensors = read_model_tensors(folder)
    assert tensors.module == {name: tuple(tensor.shape) for name, tensor in held.items()}
    expected = {**tensors.conversion.checkpoint_shapes(tensors.module), **tensors.mtp}
    own = {name: tensor for name, tensor in files.items() if shared_by_mtp(name) is None}
    assert expected == {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = dict(tensors.conversion.to_checkpoint(held.items()))
    assert found.keys() == own.keys() - tensors.mtp.keys()
    assert all(torch.equal(found[name], own[name]) for name in found)
    back = dict(tensors.conversion.to_module(reversed(found.items())))
    assert back.keys() == held.keys()
    assert all(torch.equal(back[name], held[name]) for name in held)
    assert tensors.conversion.module_shapes({name: expected[name] for name in found}) == tensors.module


def test_parts_of_a_tensor_are_views_that_come_when_it_is_read(tmp_path: pathlib.Path) -> None:
    folder = write_model("Qwen3-MoE", tmp_path / "model")
    tensors = read_model_tensors(folder)
    held, read = module_form(folder), []

    def source() -> Iterator[Named]:
        for name, tensor in held.items():
            read.append(name)
            yield name, tensor

    whole = {held[name].untyped_storage().data_ptr() for name in held}
    for _, part in tensors.conversion.to_checkpoint(source()):
        assert held[read[-1]].untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        assert part.untyped_storage().data_ptr() in whole
        assert part.is_contiguous()


def test_an_incomplete_group_is_an_error_that_names_what_is_missing(tmp_path: pathlib.Path) -> None:
    folder = write_model("MiniMax-M2", tmp_path / "model")
    tensors = read_model_tensors(folder)
    shapes = tensors.conversion.checkpoint_shapes(tensors.module)
    missing = "model.layers.2.block_sparse_moe.experts.5.w3.weight"
    with pytest.raises(ValueError, match=rf"layers\.2\.mlp\.experts\.gate_up_proj cannot be made.* e\.g\. {missing}"):
        tensors.conversion.module_shapes({name: shape for name, shape in shapes.items() if name != missing})
