"""The settings of a configuration that somebody must have given, without those that are derived or defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.config.job import examine, resolved
from miles.config.schema.catalog import catalog

_LAST = ("global_batch_size", "rollout_batch_size", "n_samples_per_prompt")
"""Of the batch sizes, each of which follows from the others, these are what people give."""
_OF_THE_MACHINE = frozenset(
    {"device", "distributed_backend", "actor_num_gpus_per_node", "train_backend", "rollout_backend", "host"}
)


def given_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the smallest part of a flat configuration from which the rest follows, on a machine with its device."""
    known, device = catalog(), flat.get("device")
    kept = {key: value for key, value in flat.items() if value is not None and key != "device"}
    for key, entry in known.items():
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        if key in kept and kept[key] == default:
            del kept[key]
    derived = [key for key, entry in known.items() if key in kept and (entry.derived or key in _OF_THE_MACHINE)]
    for key in sorted(derived, key=lambda key: _LAST.index(key) if key in _LAST else -1):
        without = {name: value for name, value in kept.items() if name != key}
        settings = examine(resolved(without, device if device in ("cpu", "cuda") else None)).settings
        if settings.is_valid(key) and getattr(settings, key) == kept[key]:
            kept = without
    return kept
