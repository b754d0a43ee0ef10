"""megatron-bridge, extended by the parameter names of layers without TransformerEngine."""

from __future__ import annotations

from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping

_GROUPED = ("mlp.experts.linear_fc1.weight*", "mlp.experts.linear_fc2.weight*")


class LocalBridge(AutoBridge):  # type: ignore[misc]
    """Maps experts computed one by one wherever the family's bridge maps grouped ones."""

    @property
    def _model_bridge(self) -> Any:
        bridge = super()._model_bridge
        registry_of_bridge = bridge.mapping_registry

        def with_single_experts() -> Any:
            registry = registry_of_bridge()
            known = {mapping.megatron_param for mapping in registry.mappings}
            added = [_single(mapping) for mapping in registry.mappings if mapping.megatron_param.endswith(_GROUPED)]
            new = [mapping for mapping in added if mapping is not None and mapping.megatron_param not in known]
            return type(registry)(*registry.mappings, *new)

        bridge.mapping_registry = with_single_experts
        return bridge


def _single(grouped: Any) -> Any | None:
    """The mapping of one expert's matrix; None for kinds of mapping that cannot be split by expert."""
    prefix, matrix = grouped.megatron_param.removesuffix(".weight*").rsplit(".", 1)
    name = f"{prefix}.local_experts.*.{matrix}.weight"
    if type(grouped) is GatedMLPMapping:
        return GatedMLPMapping(name, **grouped.hf_param)
    return AutoMapping(name, grouped.hf_param, grouped.permute_dims) if type(grouped) is AutoMapping else None
