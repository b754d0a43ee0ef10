"""The parameters of a torch_dist checkpoint, whoever saved it, read into a model's chunks in any layout."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from miles.services.trainer.checkpoint.errors import MisfitError, reading

_OF_ONE_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_STATE_OF_KERNELS = "._extra_state"


def load_weights(directory: pathlib.Path, chunks: Sequence[Any], *, but: str | None = None) -> None:
    """Read the parameters of the chunks, without wrappers, in place, `but` for those of that prefix; collective.

    Raises MisfitError when some are missing or of another shape, and ValueError for what cannot be read.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with reading(directory):
        metadata = _naming(directory)
        keys = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
        asked = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(keys, chunks, strict=True)}
        for state in asked.values() if but is not None else ():
            for name in [name for name in state if name.startswith(str(but))]:
                del state[name]
        loaded, _, missing = dist_checkpointing.load(asked, str(directory), strict=StrictHandling.RETURN_ALL)
        by_rank: list[set[str]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, {name for name in missing if _STATE_OF_KERNELS not in name})
    if lacking := sorted(set().union(*by_rank)):
        names = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} others" if len(lacking) > 3 else "")
        raise MisfitError(f"{directory} has no {names}: it is of another model than hf_checkpoint")
    for key, chunk in zip(keys, chunks, strict=True):
        chunk.load_state_dict(loaded[key], strict=False)


def _naming(directory: pathlib.Path) -> dict[str, Any]:
    """How its tensors are named and cut: what its writer recorded, and whether each layer has tensors of its own."""
    from megatron.core import dist_checkpointing

    recorded = dict(dist_checkpointing.load_content_metadata(str(directory)) or {})
    names = dist_checkpointing.load_tensors_metadata(str(directory))
    return recorded | {"non_homogeneous_layers": any(_OF_ONE_LAYER.match(name) for name in names)}
