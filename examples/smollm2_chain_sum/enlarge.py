"""Turn a dense Llama checkpoint into a large one that gives the same answers and costs what its size costs.

    python -m examples.smollm2_chain_sum.enlarge --model .cache/smollm2-135m-instruct --out .cache/smollm2-large

- Wider: hidden size D → D'. Embeddings, and what reads from or adds to the residual stream, get zeros. A norm then
  takes its mean over D' elements, of which D are not zero; weights times sqrt(D / D') and an epsilon times D / D'
  make up for it. Feed-forward layers get hidden units, and attention gets heads, whose weights are zero: each group
  of query heads that share a key grows, and there are more groups.
- Deeper: layers behind the last one whose output projections are zero.

Gradients of what was added are zero too where its inputs and outputs are, so training moves what the small model has; a
deeper model's new layers do learn. The default is 1.9 billion parameters, 14 times SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from examples.smollm2_chain_sum.new_folder import check_new

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NORM = re.compile(r"(?:layernorm|\.norm)\.weight$")


def enlarged_config(
    config: Any, *, hidden: int, feed_forward: int, heads: int, kv_heads: int, layers: int | None = None
) -> Any:
    """The configuration of the large model; heads keep their size.

    Raises ValueError for a model that cannot be enlarged to these sizes.
    """
    small = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    sizes, count = (hidden, feed_forward, heads, kv_heads), layers or config.num_hidden_layers
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"only a Llama model without biases can be enlarged, not this {config.model_type}")
    if any(new < old for new, old in zip(sizes, small, strict=True)) or count < config.num_hidden_layers:
        raise ValueError(f"sizes {sizes} with {count} layers: the model has {small} with {config.num_hidden_layers}")
    if heads % kv_heads or heads // kv_heads < config.num_attention_heads // config.num_key_value_heads:
        raise ValueError(
            f"{heads} heads over {kv_heads} pairs of keys and values: a pair has to serve a whole number of heads, "
            f"and at least {config.num_attention_heads // config.num_key_value_heads}"
        )
    large = type(config).from_dict(config.to_dict())
    large.hidden_size, large.intermediate_size, large.num_attention_heads, large.num_key_value_heads = sizes
    large.num_hidden_layers, large.head_dim = count, config.head_dim
    large.rms_norm_eps = config.rms_norm_eps * config.hidden_size / hidden
    return large


def enlarged(model: Any, **sizes: Any) -> Any:
    """A model of the same class and dtype with the logits of `model`; see `enlarged_config` for the sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = enlarged_config(model.config, **sizes)
    large: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    source = model.state_dict()
    with torch.no_grad():
        for name, weight in large.state_dict().items():
            layer = _LAYER.match(name)
            if layer is None or int(layer[1]) < model.config.num_hidden_layers:
                weight.copy_(_padded(name, source[name], tuple(weight.shape), model.config, config))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # the rest of a new layer keeps its random weights
    large.generation_config = model.generation_config
    return large


def _padded(name: str, weight: Any, shape: tuple[int, ...], old: Any, new: Any) -> Any:
    """A tensor of the large model."""
    if _NORM.search(name):
        weight = weight * math.sqrt(old.hidden_size / new.hidden_size)
    if name.endswith("q_proj.weight"):
        weight = spread_heads(weight, old, new)
    elif name.endswith("o_proj.weight"):
        weight = spread_heads(weight.T, old, new).T
    grown = weight.new_zeros(shape)
    grown[tuple(slice(size) for size in weight.shape)] = weight
    return grown


def spread_heads(weight: Any, old: Any, new: Any) -> Any:
    """Rows (heads · head size, D) with heads of zeros behind those of each group, so that groups keep their keys.

    `old` and `new` are configurations, of which the numbers of heads are read.
    """
    groups, columns = old.num_key_value_heads, weight.shape[1]
    rows = weight.view(groups, old.num_attention_heads // groups, old.head_dim, columns)
    spread = weight.new_zeros((groups, new.num_attention_heads // new.num_key_value_heads, old.head_dim, columns))
    spread[:, : rows.shape[1]] = rows
    return spread.reshape(-1, columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a checkpoint and write the large model with the same tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of the small model")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8, help="pairs of keys and values")
    parser.add_argument("--layers", type=int, help="the small model's by default")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the folder; the small model's by default")
    args = parser.parse_args(arguments)
    check_new(parser, args.out)
    small = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype or "auto")
    sizes = {"hidden": args.hidden, "feed_forward": args.feed_forward, "heads": args.heads, "kv_heads": args.kv_heads}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = enlarged(small, **sizes, layers=args.layers)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} million parameters in {args.out}")


if __name__ == "__main__":
    main()
