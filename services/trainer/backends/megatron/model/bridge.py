"""megatron-bridge, with names for what its layers are called without TransformerEngine."""

from __future__ import annotations

from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping

_GROUPED = ("mlp.experts.linear_fc1.weight*", "mlp.experts.linear_fc2.weight*")


class LocalBridge(AutoBridge):  # type: ignore[misc]
    """Knows experts that are computed one after the other wherever the family's bridge knows grouped ones."""

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
    """The mapping of one expert's matrix; None for a kind that is another on disk."""
    prefix, matrix = grouped.megatron_param.removesuffix(".weight*").rsplit(".", 1)
    name = f"{prefix}.local_experts.*.{matrix}.weight"
    if type(grouped) is GatedMLPMapping:
        return GatedMLPMapping(name, **grouped.hf_param)
    return AutoMapping(name, grouped.hf_param, grouped.permute_dims) if type(grouped) is AutoMapping else None
