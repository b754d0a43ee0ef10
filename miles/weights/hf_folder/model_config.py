"""transformers' configuration of the model in a folder, for code that computes with weights that are not quantised."""

from __future__ import annotations

import pathlib
from typing import Any


def read_model_config(folder: str | pathlib.Path) -> Any:
    """Read config.json; models built from the result have ordinary matrices, whatever the folder's files hold.

    Raises OSError or ValueError when transformers cannot read it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config
