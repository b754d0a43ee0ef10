"""The policy's weights under the names of its Hugging Face checkpoint, a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.services.trainer.backends.megatron.model.build_model import MegatronModel

Named = tuple[str, torch.Tensor]
_EXPERT = re.compile(r"(?P<layer>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class Exporter:
    """Gathers one parameter after the other: no rank ever holds more of the model than its own part and one tensor."""

    def __init__(self, model: MegatronModel, dtype: torch.dtype, *, fuse_experts: bool) -> None:
        """`fuse_experts` joins a layer's experts as transformers' modelling code holds them, and leaves out MTP layers,
        which it does not have.

        Collective: it runs one export to learn the layout.
        """
        self._model = model
        self._dtype = dtype
        self._fuse = fuse_experts
        self._tasks: list[Any] = model.bridge.get_conversion_tasks(model.chunks)
        self._by_token = {
            task.mapping.hf_param
            for task in self._tasks
            if task is not None and task.global_param_name.endswith(("word_embeddings.weight", "output_layer.weight"))
        } | {"lm_head.weight"}
        self.layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors()]

    def tensors(self, *, fuse: bool | None = None) -> Iterator[Named]:
        """Complete tensors on every rank, in a fixed order; collective."""
        if self._fuse if fuse is None else fuse:
            main = [task for task in self._tasks if task is None or not task.global_param_name.startswith("mtp.")]
            yield from join_experts(self._gathered(main))
        else:
            yield from self._gathered(self._tasks)

    def _gathered(self, tasks: list[Any]) -> Iterator[Named]:
        weights = self._model.bridge.export_hf_weights(
            self._model.chunks, cpu=False, show_progress=False, conversion_tasks=tasks
        )
        for name, tensor in weights:
            full = tensor.detach()
            if name in self._by_token:
                full = full[: self._model.vocabulary]  # without the padding that makes it divide over ranks
            yield name, full.to(self._dtype) if full.is_floating_point() else full


def join_experts(tensors: Iterable[Named]) -> Iterator[Named]:
    """Per-expert matrices as the two three-dimensional parameters that transformers 5 has for a layer.

    gate_up_proj is [experts, 2 × intermediate, hidden], gate first, and down_proj [experts, hidden, intermediate]. A
    layer's parameters come where its last expert was; all other tensors pass through.
    """
    layer: str | None = None
    parts: dict[tuple[str, int], torch.Tensor] = {}
    for name, tensor in tensors:
        match = _EXPERT.fullmatch(name)
        if layer is not None and (match is None or match["layer"] != layer):
            yield from _joined(layer, parts)
            layer, parts = None, {}
        if match is None:
            yield name, tensor
        else:
            layer = match["layer"]
            parts[match["part"], int(match["expert"])] = tensor
    if layer is not None:
        yield from _joined(layer, parts)


def _joined(layer: str, parts: dict[tuple[str, int], torch.Tensor]) -> Iterator[Named]:
    experts = sorted({expert for _, expert in parts})
    gate, up, down = ([parts[part, expert] for expert in experts] for part in ("gate", "up", "down"))
    yield f"{layer}.gate_up_proj", torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    yield f"{layer}.down_proj", torch.stack(down)
