"""megatron-bridge, reading quantised folders too, and knowing layers that are not as its own providers build them."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, Self

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, ReplicatedMapping
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.hf_pretrained.state import StateDict, StateSource

from miles.weights.hf_folder import mimo
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.hf_folder.plain_tensors import PlainTensors

_GROUPED = ("mlp.experts.linear_fc1.weight*", "mlp.experts.linear_fc2.weight*")

_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms in TransformerEngine's matrices, and in layers that have them apart; the bridge knows it of decoder layers."""


class FolderTensors(StateSource):  # type: ignore[misc]
    """The tensors of a Hugging Face folder, dequantised as they are read, as megatron-bridge asks for them."""

    def __init__(self, tensors: PlainTensors) -> None:
        self._tensors = tensors
        self._names = sorted(tensors)

    def get_all_keys(self) -> list[str]:
        """Names of all tensors."""
        return self._names

    def load_tensors(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """Some tensors by name."""
        return {key: self._tensors[key] for key in keys if key in self._tensors}


class PlainPretrained(PreTrainedCausalLM):  # type: ignore[misc]
    """A Hugging Face folder whose quantised weights megatron-bridge sees as ordinary ones."""

    def _load_config(self) -> Any:
        return read_model_config(self.model_name_or_path)

    @property
    def state(self) -> StateDict:
        """The tensors; float32 where they were quantised, which is exact, and parameters get theirs rounded once."""
        return self._tensors

    @functools.cached_property
    def _tensors(self) -> StateDict:
        return StateDict(FolderTensors(PlainTensors(self.model_name_or_path, torch.float32)))


class LayerBridge(AutoBridge):  # type: ignore[misc]
    """For layers that have `layers.all_heads_norm` where the family's bridge expects norms in parts."""

    @classmethod
    def from_folder(cls, folder: pathlib.Path) -> Self:
        """The bridge of a Hugging Face folder's model. Raises ValueError for a model that there is no bridge for."""
        mimo.register()
        bridge: Self = cls.from_hf_pretrained(str(folder))
        bridge.hf_pretrained = PlainPretrained.from_pretrained(str(folder))
        return bridge

    def load_hf_weights(
        self, model: list[Any], hf_path: str | pathlib.Path | None = None, allowed_mismatched_params: Any = None
    ) -> list[Any]:
        """Fill chunks with the weights of a folder; by default those of the bridge's own."""
        source = self.hf_pretrained if hf_path is None else PlainPretrained.from_pretrained(str(hf_path))
        self._model_bridge.load_weights_hf_to_megatron(source, model, allowed_mismatched_params)
        return model

    @property
    def _model_bridge(self) -> Any:
        bridge = super()._model_bridge
        registry_of_bridge = bridge.mapping_registry

        def changed() -> Any:
            registry = registry_of_bridge()
            return type(registry)(*self._changed(list(registry.mappings)))

        bridge.mapping_registry = changed
        return bridge

    def _changed(self, mappings: list[Any]) -> list[Any]:
        known = {mapping.megatron_param for mapping in mappings}
        norms = [norm for mapping in mappings if (norm := _norm_apart(mapping)).megatron_param not in known]
        return [_whole(mapping) for mapping in (*mappings, *norms)]


class SingleExpertBridge(LayerBridge):
    """Also maps experts computed one by one wherever the family's bridge maps grouped ones."""

    def _changed(self, mappings: list[Any]) -> list[Any]:
        known = {mapping.megatron_param for mapping in mappings}
        added = [_single(mapping) for mapping in mappings if mapping.megatron_param.endswith(_GROUPED)]
        new = [mapping for mapping in added if mapping is not None and mapping.megatron_param not in known]
        return super()._changed([*mappings, *new])


def _norm_apart(mapping: Any) -> Any:
    """The mapping of an MTP layer's norm where it is not fused with the matrix behind it; others unchanged."""
    name = mapping.megatron_param
    for fused, apart in _NORMS.items():
        if name.startswith("mtp.") and name.endswith(fused):
            return AutoMapping(name.removesuffix(fused) + apart, mapping.hf_param)
    return mapping


def _whole(mapping: Any) -> Any:
    """The mapping of a norm over all heads, whose weight every tensor-parallel rank holds; others unchanged."""
    from megatron.bridge.models.minimax_m2.minimax_m2_bridge import _FullDimQKNormMapping

    if type(mapping) is _FullDimQKNormMapping:
        return ReplicatedMapping(mapping.megatron_param, mapping.hf_param)
    return mapping


def _single(grouped: Any) -> Any | None:
    """The mapping of one expert's matrix; None for kinds of mapping that cannot be split by expert."""
    prefix, matrix = grouped.megatron_param.removesuffix(".weight*").rsplit(".", 1)
    name = f"{prefix}.local_experts.*.{matrix}.weight"
    if type(grouped) is GatedMLPMapping:
        return GatedMLPMapping(name, **grouped.hf_param)
    return AutoMapping(name, grouped.hf_param, grouped.permute_dims) if type(grouped) is AutoMapping else None
