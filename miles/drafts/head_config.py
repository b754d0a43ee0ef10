"""The configuration of an EAGLE-3 head, in the form in which SGLang reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "LlamaForCausalLMEagle3"
"""What `architectures` of a head's config.json says; the one kind of EAGLE-3 head that is trained and served here."""
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_UNKNOWN = ("fc_norm", "use_aux_norm", "norm_before_fc", "norm_output", "bias", "attention_bias")
"""What SGLang has for heads of other papers, and this head has not."""


def head_config(config: Mapping[str, Any]) -> Any:
    """transformers' LlamaConfig of a head, out of its config.json.

    Raises ValueError naming all that such a head may have and this one cannot.
    """
    from transformers import LlamaConfig

    eagle = config.get("eagle_config") or {}
    faults = [f"it has {name}" for name in _UNKNOWN if config.get(name) or eagle.get(name)]
    if ARCHITECTURE not in (config.get("architectures") or ()):
        faults.append(f"its architectures are {config.get('architectures')}, not [{ARCHITECTURE!r}]")
    if config.get("draft_vocab_size") is None or config.get("tie_word_embeddings"):
        faults.append("it has no lm_head of its own: draft_vocab_size has to be set, and tie_word_embeddings false")
    if config.get("target_hidden_size", config.get("hidden_size")) != config.get("hidden_size"):
        faults.append(f"target_hidden_size is {config['target_hidden_size']}, hidden_size {config.get('hidden_size')}")
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act is {config['hidden_act']}, not silu")
    if features(config) < 2:
        faults.append("it reads one hidden state")
    if faults:
        raise ValueError(f"the EAGLE-3 head cannot be used: {'; '.join(faults)}")
    return LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})


def features(config: Mapping[str, Any]) -> int:
    """How many hidden states of the policy a head reads at each position."""
    if config.get("num_aux_hidden_states") is not None:
        return int(config["num_aux_hidden_states"])
    return len((config.get("eagle_config") or {}).get(LAYER_IDS) or (0, 1, 2))
