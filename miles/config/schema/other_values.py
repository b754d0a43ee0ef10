"""Values of recipes that have another name here, or that another value stands in for."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

OTHER_NAMES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "attn_implementation": dict.fromkeys(
        ("flash_attention_2", "flash_attention_3"),
        ("auto", "auto computes attention by PyTorch's own FlashAttention where it can, without that package"),
    ),
    "update_weight_transfer_mode": {
        "p2p": ("auto", "there is no transport by Mooncake; auto takes the fastest one that the machines share"),
        "disk-delta": ("disk_delta", "it is called disk_delta here"),
    },
}
"""By setting, what a value of other systems becomes, and why."""


def take_other_names(s: FlatSettings) -> list[Fault]:
    """Values of recipes that mean what another value is called here, or for which that stands in."""
    for key, names in OTHER_NAMES.items():
        if s.is_valid(key) and getattr(s, key) in names:
            s.replace(key, *names[getattr(s, key)])
    if s.is_valid("rm_type") and s.rm_type and s.custom_rm_path:
        s.replace("rm_type", None, f"custom_rm_path = {s.custom_rm_path} scores in its place")
    if s.eval_prompt_data and len(s.eval_prompt_data) == 1:
        path = s.eval_prompt_data[0]
        name = re.sub(r"[^\w.-]", "_", pathlib.PurePath(path.partition("@[")[0]).stem) or "eval"
        s.replace("eval_prompt_data", (name, path), f"its only word is a file, and {name} the data set's name")
    return []
