"""transformers' configuration of the model in a folder, for code that computes with weights that are not quantised."""

from __future__ import annotations

import pathlib
from typing import Any

from miles.precision.quantization_config import QUANTISED_BY
from miles.weights.hf_folder import mimo


def read_model_config(folder: str | pathlib.Path) -> Any:
    """Read config.json; models built from the result have ordinary matrices, whatever the folder's files hold.

    Raises OSError or ValueError when transformers cannot read it.
    """
    from transformers import AutoConfig

    mimo.register()
    config = AutoConfig.from_pretrained(folder)
    for key in QUANTISED_BY:
        if getattr(config, key, None) is not None:
            delattr(config, key)
    return config
