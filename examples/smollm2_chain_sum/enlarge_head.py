"""Turn the EAGLE-3 head of a small model into one for the large model of `enlarge`, which drafts the same.

    python -m examples.smollm2_chain_sum.enlarge_head --head .cache/head --out .cache/large-head

The large model's residual stream is the small one's with zeros behind it. What reads it gets columns of zeros, what
adds to it rows of zeros, norms are scaled and attention heads added as in the large model; feed-forward layers keep
their size.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from examples.smollm2_chain_sum.enlarge import spread_heads
from examples.smollm2_chain_sum.new_folder import check_new
from miles.config.checks.json_file import read_json_object
from miles.drafts.folder import module_name, read_tensors, write_draft
from miles.drafts.head_config import head_config

if TYPE_CHECKING:
    import torch

_WRITERS = ("o_proj.weight", "down_proj.weight")
"""Of these the rows, not the columns, belong to the residual stream."""


def enlarged_head(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, hidden: int, heads: int, kv_heads: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of the head for a model of these sizes; attention heads keep their size.

    Raises ValueError for sizes that cannot hold the head.
    """
    old = head_config(config)
    small = (old.hidden_size, old.num_attention_heads, old.num_key_value_heads)
    if hidden < small[0] or kv_heads < small[2] or heads // kv_heads < small[1] // small[2] or heads % kv_heads:
        raise ValueError(
            f"sizes {(hidden, heads, kv_heads)} (hidden, heads, keys and values) cannot hold the head's {small}"
        )
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    large = {**config, **sizes, "rms_norm_eps": old.rms_norm_eps * small[0] / hidden}
    new = head_config(large)
    return large, {name: _enlarged(module_name(name), tensor, old, new) for name, tensor in tensors.items()}


def _enlarged(name: str, tensor: torch.Tensor, old: Any, new: Any) -> torch.Tensor:
    size, hidden = old.hidden_size, new.hidden_size
    if name in ("d2t", "t2d"):
        return tensor
    if tensor.dim() == 1:
        return _padded(tensor * math.sqrt(size / hidden), -1, hidden)
    if name.endswith("q_proj.weight"):
        tensor = _padded(spread_heads(tensor, old, new), 0, new.num_attention_heads * new.head_dim)
    elif name.endswith(("k_proj.weight", "v_proj.weight")):
        tensor = _padded(tensor, 0, new.num_key_value_heads * new.head_dim)
    elif name.endswith("o_proj.weight"):
        tensor = _padded(spread_heads(tensor.T, old, new), 0, new.num_attention_heads * new.head_dim).T
    if name.endswith(_WRITERS):
        return _padded(tensor, 0, hidden)
    wide = _padded(tensor.unflatten(1, (-1, size)), -1, hidden).flatten(1)
    return _padded(wide, 0, hidden) if name == "fc.weight" else wide


def _padded(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """With zeros behind it along a dimension, up to this length."""
    shape = list(tensor.shape)
    shape[dim] = length
    grown = tensor.new_zeros(shape)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a head and write the large one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=pathlib.Path, required=True, help="folder of the small model's head")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of the large model")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8, help="pairs of keys and values")
    args = parser.parse_args(arguments)
    check_new(parser, args.out)
    small, sizes = read_json_object(args.head / "config.json"), {"heads": args.heads, "kv_heads": args.kv_heads}
    config, tensors = enlarged_head(small, read_tensors(args.head), hidden=args.hidden, **sizes)
    write_draft(args.out, config, tensors)
    print(f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.0f} million parameters in {args.out}")


if __name__ == "__main__":
    main()
