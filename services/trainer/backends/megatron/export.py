"""The policy's weights under the names of its Hugging Face checkpoint, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.services.trainer.backends.megatron.model.build_model import MegatronModel
from miles.weights.naming.conversion import Named
from miles.weights.naming.model_tensors import ModelTensors, shared_by_mtp


class Exporter:
    """Gathers one parameter after the other: no rank ever holds more of the model than its own part and one tensor."""

    def __init__(self, model: MegatronModel, tensors: ModelTensors, dtype: torch.dtype) -> None:
        """`tensors` are those of the model's Hugging Face folder; weights are exported in `dtype`."""
        self._model = model
        self._tensors = tensors
        self._dtype = dtype
        self._tasks: list[Any] = model.bridge.get_conversion_tasks(model.chunks)
        self._by_token = {
            task.mapping.hf_param
            for task in self._tasks
            if task is not None and task.global_param_name.endswith(("word_embeddings.weight", "output_layer.weight"))
        } | {"lm_head.weight"}

    def tensors(self, *, mtp: bool = True) -> Iterator[Named]:
        """Complete tensors on every rank, in a fixed order, with the model's MTP layers or without; collective."""
        return self.gathered(self.tasks(mtp=mtp))

    def tasks(self, *, mtp: bool) -> list[Any]:
        """megatron-bridge's tasks, each of which gathers one parameter; as many on every rank, in the same order."""
        return [task for task in self._tasks if mtp or task is None or not task.global_param_name.startswith("mtp.")]

    def gathered(self, tasks: Iterable[Any]) -> Iterator[Named]:
        """What these tasks gather, the next task taken when the tensors of the last one have been; collective."""
        weights = self._model.bridge.export_hf_weights(
            self._model.chunks,
            cpu=False,
            show_progress=False,
            conversion_tasks=tasks,
            merge_adapter_weights=False,  # engines merge them, and `lora.adapter` does as they do
        )
        for given, tensor in weights:
            name, full = given.replace(".base_layer", ""), tensor.detach()  # of the weights beside an adapter
            if shared_by_mtp(name) is not None:
                continue  # some bridges export the model's own again as an MTP layer's
            if name in self._by_token:
                full = full[: self._model.vocabulary]  # without the padding that makes it divide over ranks
            yield name, full.to(self._tensors.exported_dtype(name, full.dtype, self._dtype))
