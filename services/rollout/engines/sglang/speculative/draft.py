"""The draft model of the servers, whose weights have a stream of versions of their own."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from miles.weights.naming.published import refuse

if TYPE_CHECKING:
    import torch

    from miles.weights.naming.conversion import Shapes

_SHARED = ("embed_tokens.weight", "lm_head.weight")

Load = Callable[[Mapping[str, "torch.Tensor"]], Awaitable[float]]


class DraftModel:
    """The target of the draft stream's subscriber; implements WeightTarget.

    A draft only proposes: whatever its weights, the tokens that the policy accepts are distributed as the policy's own.
    So its versions affect neither the policy's version nor which servers get requests.
    """

    def __init__(self, device: torch.device, folder: str, load: Load, verify: Callable[[], Awaitable[None]]) -> None:
        """`folder`: its checkpoint. `load` has the servers load tensors; `verify` raises unless they hold them."""
        self.device = device
        self.version: int | None = None
        self._shapes = checkpoint_shapes(pathlib.Path(folder))
        self._load = load
        self._verify = verify
        self._tensors: Mapping[str, torch.Tensor] = {}

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in draft weights between two steps; return the pause time in seconds.

        Raises ValueError before anything changed when the checkpoint has no such parameters.
        """
        faults = [
            f"{name} has shape {tuple(tensor.shape)}; the draft model's is {self._shapes.get(name, 'not there')}"
            for name, tensor in tensors.items()
            if self._shapes and self._shapes.get(name) != tuple(tensor.shape)
        ]
        refuse(faults, "the draft model")
        self.version = None
        pause_s = await self._load(tensors)
        self.version, self._tensors = version, tensors
        return pause_s

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The last weights loaded, once the servers are proven to hold them. Raises ChecksumMismatch."""
        await self._verify()
        return self._tensors


def checkpoint_shapes(folder: pathlib.Path) -> Shapes:
    """Shape of every tensor in a folder's safetensors files, by name; empty when it has none. Reads only headers.

    SGLang ignores unknown names, so that a draft would silently stay as it was.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def own_parameters(
    tensors: Mapping[str, torch.Tensor], algorithm: str, policy_shapes: Shapes
) -> Mapping[str, torch.Tensor]:
    """The draft's tensors without those whose memory may be the policy's.

    In SGLang, drafts of the EAGLE family use the policy's own embeddings, and some its head: loading these tensors
    would overwrite the policy. A STANDALONE draft shares nothing.
    """
    if algorithm.upper() == "STANDALONE":
        return tensors
    shared = {shape for name, shape in policy_shapes.items() if name.endswith(_SHARED)}
    return {n: t for n, t in tensors.items() if not (n.endswith(_SHARED) and tuple(t.shape) in shared)}
