"""Turn a dense Llama checkpoint into a mixture of experts that gives the same answers.

    python -m examples.smollm2_chain_sum.upcycle --model .cache/smollm2-135m-instruct --out .cache/smollm2-moe

Every layer's feed-forward network becomes four experts that are copies of it, of which a small random router picks two
(Sparse Upcycling, https://arxiv.org/abs/2212.05055). The weights of the chosen experts add up to one, so at first every
choice gives the dense model's answer; training makes the experts differ. The architecture is GLM-4.5's without norms of
queries and keys, which training backends and engines know. Its shared expert begins with a `down_proj` of zeros, and
with output weights of its own, equal to the embedding if that was shared. `--align 128` pads it (`align.py`).
`--mtp-layers 1` adds a layer for multi-token prediction that has learnt nothing yet: the last layer again, behind a
random projection (`mtp.py`).
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from examples.smollm2_chain_sum.align import aligned
from examples.smollm2_chain_sum.mtp import add_mtp_layers
from examples.smollm2_chain_sum.new_folder import check_new

SHARED_ACROSS_KINDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def moe_config(dense: Any, experts: int, top_k: int) -> Any:
    """The configuration of the mixture. Raises ValueError for a dense model that it cannot express."""
    from transformers import Glm4MoeConfig

    rope = dict(dense.rope_parameters)
    if dense.model_type != "llama" or dense.attention_bias or dense.mlp_bias or rope["rope_type"] != "default":
        raise ValueError(
            f"only a Llama model without biases and without scaled rotary embeddings can be upcycled, not this "
            f"{dense.model_type} with attention_bias={getattr(dense, 'attention_bias', None)}, "
            f"mlp_bias={getattr(dense, 'mlp_bias', None)}, rope_type={rope['rope_type']}"
        )
    if not 2 <= top_k <= experts:
        raise ValueError(
            f"experts per token = {top_k}: must be at least 2 and at most the number of experts, {experts}"
        )
    return Glm4MoeConfig(
        **{name: getattr(dense, name) for name in SHARED_ACROSS_KINDS},
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=dense.intermediate_size,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_shared_experts=1,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
        attention_bias=False,
        tie_word_embeddings=False,
        rope_parameters=rope | {"partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,  # where the other one is not read
        num_nextn_predict_layers=0,
    )


def upcycle(dense: Any, experts: int = 4, top_k: int = 2, *, router_std: float = 0.02, seed: int = 0) -> Any:
    """A `Glm4MoeForCausalLM` with the logits of a `LlamaForCausalLM`, in its dtype.

    Args:
        dense: the model; it is left as it is.
        experts: experts of each layer.
        top_k: experts that a token goes to.
        router_std: standard deviation of the routers' weights; larger ones prefer experts more strongly.
        seed: of the routers' weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(moe_config(dense.config, experts, top_k), dtype=dense.dtype)
    source, weights = dense.state_dict(), model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        layer, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            found = torch.randn(weight.shape, generator=generator) * router_std
        elif part == "gate.e_score_correction_bias" or part == "shared_experts.down_proj.weight":
            found = torch.zeros_like(weight)
        elif part.startswith("shared_experts."):
            found = source[f"{layer}.mlp.{part.removeprefix('shared_experts.')}"]
        elif part == "experts.gate_up_proj":
            halves = [source[f"{layer}.mlp.{matrix}_proj.weight"] for matrix in ("gate", "up")]
            found = torch.cat(halves).expand(experts, -1, -1)
        elif part == "experts.down_proj":
            found = source[f"{layer}.mlp.down_proj.weight"].expand(experts, -1, -1)
        else:
            found = source[name]
        weight.copy_(found)
    model.generation_config = dense.generation_config
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a checkpoint and write the mixture with the same tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of the dense model")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--experts", type=int, default=4, help="experts of each layer")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the routers' weights")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' weights")
    parser.add_argument("--align", type=int, metavar="N", help="pad all sizes to multiples of N, as FP8 wants 128")
    parser.add_argument("--mtp-layers", type=int, default=0, metavar="N", help="layers for multi-token prediction")
    args = parser.parse_args(arguments)
    check_new(parser, args.out)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    model = upcycle(dense, args.experts, args.experts_per_token, router_std=args.router_std, seed=args.seed)
    if args.align:
        model = aligned(model, args.align)
    model.save_pretrained(args.out)
    if args.mtp_layers:
        add_mtp_layers(args.out, args.mtp_layers, seed=args.seed)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} million parameters in {args.out}")


if __name__ == "__main__":
    main()
