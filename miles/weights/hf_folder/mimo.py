"""MiMo (arXiv 2505.07608), of which transformers has no code: Qwen2 with MTP layers under names of their own.

Published folders bring code that says the same; it is not run.
"""

from __future__ import annotations

import functools

MODEL_TYPE = "mimo"


@functools.cache
def register() -> None:
    """Have transformers' auto classes read MiMo's folders, without MTP layers, as those of other models."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    class MiMoConfig(Qwen2Config):  # type: ignore[no-untyped-call]
        model_type = MODEL_TYPE

    class MiMoForCausalLM(Qwen2ForCausalLM):  # type: ignore[no-untyped-call]
        config_class = MiMoConfig
        _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]  # noqa: RUF012

    AutoConfig.register(MODEL_TYPE, MiMoConfig)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM)
