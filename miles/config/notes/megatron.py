"""Notes on settings of the Megatron-Core backend that do less than their names say."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings

WITH_ENGINE_ALONE = ("layernorm", "moe_act")
"""Parts of layers that Megatron-Core can recompute with TransformerEngine alone."""
_FUSED = {
    "moe_grouped_gemm": "layers without it compute one expert after the other",
    "moe_permute_fusion": "layers without it sort tokens by expert in plain PyTorch",
    "moe_router_fusion": "layers without it choose experts in plain PyTorch",
    "moe_shared_expert_overlap": "layers without it compute shared experts by themselves",
}


@noted
def kernels_of_transformer_engine(s: FlatSettings) -> Iterator[Note]:
    """Without TransformerEngine a setting of its kernels changes nothing, and the results are the same."""
    if s.train_backend != "megatron" or not (s.device == "cpu" or s.transformer_impl == "local"):
        return
    why = "device is cpu" if s.device == "cpu" else "transformer_impl is local"
    for key, otherwise in _FUSED.items():
        if getattr(s, key):
            yield Note(key, True, f"it changes nothing here: it needs TransformerEngine, and {why}; {otherwise}")
    for name in s.recompute_modules if s.recompute_granularity == "selective" else ():
        if name in WITH_ENGINE_ALONE:
            text = f"it changes nothing here: it is recomputed in TransformerEngine's layers alone, and {why}"
            yield Note("recompute_modules", name, text)
    if s.attention_backend != "auto":
        text = f"it changes nothing here: it is of TransformerEngine's kernels, and {why}"
        yield Note("attention_backend", s.attention_backend, f"{text}; attention is PyTorch's")


@noted
def nothing_is_dropped(s: FlatSettings) -> Iterator[Note]:
    if s.moe_token_drop_policy is not None:
        text = "it changes nothing: experts have no capacity, so no token is dropped"
        yield Note("moe_token_drop_policy", s.moe_token_drop_policy, text)


@noted
def no_loss_balances_experts(s: FlatSettings) -> Iterator[Note]:
    kind = s.moe_router_load_balancing_type
    if kind in ("seq_aux_loss", "global_aux_loss") and not s.moe_aux_loss_coeff:
        yield Note("moe_router_load_balancing_type", kind, "it changes nothing: moe_aux_loss_coeff is 0")
