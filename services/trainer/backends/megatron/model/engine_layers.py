"""Whether a model's layers can be TransformerEngine's."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.config.checks.json_file import read_json_object

if TYPE_CHECKING:
    from miles.config import JobConfig

LOCAL_ONLY = {"gemma2": "megatron-bridge's soft-capped attention for its layers takes no packed sequences"}
"""Model types whose layers are Megatron-Core's own even where TransformerEngine is installed, each with the reason."""

ABSENT = "it is not installed"


def why_no_engine(config: JobConfig) -> str | None:
    """Why a model's layers cannot be TransformerEngine's; None when they can."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        return ABSENT
    kind = read_json_object(pathlib.Path(str(config.rollout.hf_checkpoint)) / "config.json").get("model_type")
    return LOCAL_ONLY.get(str(kind))
