"""An EAGLE-3 head from nothing, for any policy with a hidden size and a vocabulary."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.folder import write_draft
from miles.drafts.head_config import ARCHITECTURE, LAYER_IDS
from miles.drafts.recorded_layers import aux_layers
from miles.drafts.vocabulary import DraftVocabulary, first_tokens
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.hf_folder.plain_tensors import PlainTensors

_SCALED = ("linear", "llama3", "yarn")
"""Rotary embeddings that SGLang's Llama and transformers' have alike, besides the plain one."""
_STD = 0.02
_FEATURES = 3
"""Hidden states that a head reads at each position."""


def write_new_head(
    policy_folder: pathlib.Path,
    folder: pathlib.Path,
    seed: int = 0,
    layers: int = 1,
    draft_vocab: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder from which SGLang and the draft trainer start; the same for the same arguments.

    `draft_vocab`: tokens that it can draft; None: all of the policy's. `dtype`: of its weights; None: the policy's.
    Raises ValueError for policies without what a head needs.
    """
    policy = read_model_config(policy_folder).get_text_config()
    if draft_vocab is not None and not 1 <= draft_vocab <= policy.vocab_size:
        raise ValueError(f"draft_vocab is {draft_vocab}; the policy has {policy.vocab_size} tokens")
    special = _special_tokens(policy_folder, policy)
    vocabulary = first_tokens(policy.vocab_size, draft_vocab or policy.vocab_size, special)
    config = new_config(policy, layers, len(vocabulary.ids_V))
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    head = _initialised(config, _stored(policy_folder), vocabulary, seed)
    tensors = {name: tensor.to(getattr(torch, config["dtype"])) for name, tensor in head.state_dict().items()}
    write_draft(folder, config, {**tensors, **vocabulary.tensors()})


def new_config(policy: Any, layers: int, draft_vocab: int) -> dict[str, Any]:
    """config.json of a head for a policy, whose (text) configuration this is."""
    size = int(policy.hidden_size)
    latent = getattr(policy, "kv_lora_rank", None) is not None
    heads = max(size // 128, 1) if latent else int(policy.num_attention_heads)
    head_dim = None if latent else getattr(policy, "head_dim", None)
    kv_heads = heads if latent else int(getattr(policy, "num_key_value_heads", None) or heads)
    inner = getattr(policy, "intermediate_size", None)
    ids = _layers_read(int(policy.num_hidden_layers))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": int(inner) if isinstance(inner, int) else 4 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": int(head_dim or size // heads),
        "hidden_act": "silu",
        "rms_norm_eps": float(getattr(policy, "rms_norm_eps", None) or 1e-6),
        "rope_parameters": _rope(policy),
        "max_position_embeddings": int(policy.max_position_embeddings),
        "vocab_size": int(policy.vocab_size),
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "num_aux_hidden_states": len(ids),
        "eagle_config": {LAYER_IDS: list(ids), "use_aux_hidden_state": True},
        "bos_token_id": policy.bos_token_id,
        "eos_token_id": policy.eos_token_id,
        "dtype": str(getattr(policy, "dtype", None) or torch.bfloat16).removeprefix("torch."),
    }


def _layers_read(num_layers: int) -> tuple[int, ...]:
    """SGLang's default, of policies that are deep enough to have three such layers; else the last ones."""
    ids = aux_layers(None, num_layers) if num_layers > 2 else ()
    return ids if len(ids) == _FEATURES else tuple(range(max(num_layers - 1 - _FEATURES, 0), num_layers - 1))


def _rope(policy: Any) -> dict[str, Any]:
    """The policy's rotary embedding where a head has it too, else the plain one with its base."""
    given = dict(getattr(policy, "rope_parameters", None) or {})
    if isinstance(given.get("full_attention"), Mapping):  # a policy with one for each type of layer
        given = dict(given["full_attention"])
    if given.get("rope_type") in _SCALED:
        return {key: value for key, value in given.items() if key != "partial_rotary_factor"}
    return {"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10000.0))}


def _initialised(
    config: dict[str, Any], policy: Mapping[str, torch.Tensor], vocabulary: DraftVocabulary, seed: int
) -> Eagle3Head:
    """A head that lets the last of the hidden states pass to the policy's own head, and adds little to it."""
    generator = torch.Generator().manual_seed(seed)
    head = Eagle3Head(config).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name != "lm_head.weight":
                torch.nn.init.normal_(parameter, std=_STD, generator=generator)
        size = head.config.hidden_size
        head.fc.weight[:, -size:] += torch.eye(size)
        head.lm_head.weight.copy_(_find(policy, ("lm_head.weight", "embed_tokens.weight"))[vocabulary.ids_V])
        final = [name for name in policy if name.endswith("model.norm.weight")]
        if final:
            head.norm.weight.copy_(policy[final[0]])
    return head


def _stored(folder: pathlib.Path) -> Mapping[str, torch.Tensor]:
    return PlainTensors(folder, torch.float32)


def _find(tensors: Mapping[str, torch.Tensor], endings: Iterable[str]) -> torch.Tensor:
    for ending in endings:
        for name in tensors:
            if name.endswith(ending):
                return tensors[name].float()
    raise ValueError(f"the policy's weights have none named {' or '.join(endings)}, from which an EAGLE-3 head begins")


def _special_tokens(folder: pathlib.Path, policy: Any) -> tuple[int, ...]:
    """Tokens that end responses."""
    path = folder / "generation_config.json"
    stated = [policy.eos_token_id, read_json_object(path).get("eos_token_id") if path.is_file() else None]
    return tuple(
        token for each in stated for token in (each if isinstance(each, list) else [each]) if token is not None
    )
