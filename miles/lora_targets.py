"""The matrices that Megatron-Core holds as one, and adapts as one."""

from __future__ import annotations

from collections.abc import Mapping

FUSED: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron-Core's linear layers with the Hugging Face layers that each of them holds."""
ALL_LINEAR = "all-linear"


def fused_targets(target_modules: str | None, exclude_modules: str | None) -> list[str]:
    """Megatron-Core's names of the layers to adapt, for lists of Hugging Face names separated by commas.

    Raises ValueError for names that are none of the layers', and for layers of which a part alone is named.
    """
    known = [part for parts in FUSED.values() for part in parts]
    targets, excluded = (_names(text) for text in (target_modules or ALL_LINEAR, exclude_modules or ""))
    wanted = set(known if ALL_LINEAR in targets else targets) - excluded
    odd = sorted((targets | excluded) - {*known, ALL_LINEAR})
    if odd:
        raise ValueError(f"{odd[0]} is none of {', '.join(known)}, {ALL_LINEAR}")
    for parts in FUSED.values():
        chosen = [part for part in parts if part in wanted]
        if chosen and len(chosen) < len(parts):
            raise ValueError(f"{', '.join(parts)} are one matrix in Megatron-Core, adapted together or not at all")
    if not wanted:
        raise ValueError("no layer is left")
    return [name for name, parts in FUSED.items() if parts[0] in wanted]


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}
