"""megatron-bridge, with the parameter names of layers that are not as its own providers build them."""

from __future__ import annotations

from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, ReplicatedMapping

_GROUPED = ("mlp.experts.linear_fc1.weight*", "mlp.experts.linear_fc2.weight*")


class LayerBridge(AutoBridge):  # type: ignore[misc]
    """For layers that have `layers.all_heads_norm` where the family's bridge expects norms in parts."""

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
        return [_whole(mapping) for mapping in mappings]


class SingleExpertBridge(LayerBridge):
    """Also maps experts computed one by one wherever the family's bridge maps grouped ones."""

    def _changed(self, mappings: list[Any]) -> list[Any]:
        known = {mapping.megatron_param for mapping in mappings}
        added = [_single(mapping) for mapping in mappings if mapping.megatron_param.endswith(_GROUPED)]
        new = [mapping for mapping in added if mapping is not None and mapping.megatron_param not in known]
        return super()._changed([*mappings, *new])


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
