"""The draft model of the servers, whose weights have a stream of versions of their own."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from miles.config.checks.json_file import read_json_object
from miles.drafts.folder import module_name
from miles.weights.naming.published import refuse

if TYPE_CHECKING:
    import torch

    from miles.weights.naming.conversion import Shapes

_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
_VOCABULARY_MAPS = ("d2t", "t2d")
"""Which tokens an EAGLE-3 head can draft: a server reads them once, when it starts."""

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
        self._shapes = {module_name(name): shape for name, shape in checkpoint_shapes(pathlib.Path(folder)).items()}
        self.config = read_json_object(pathlib.Path(folder) / "config.json")
        """config.json of its checkpoint."""
        self._load = load
        self._verify = verify
        self._tensors: Mapping[str, torch.Tensor] = {}

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in draft weights between two steps; return the pause time in seconds.

        Raises WeightsRefused before anything changed when the checkpoint has no such parameters, or others too: SGLang
        would keep what it has of those. Embeddings, a head and maps of the vocabulary may be left out.
        """
        held = self._shapes
        faults = [
            f"{name} has shape {tuple(tensor.shape)}; the draft model's is {held.get(module_name(name), 'not there')}"
            for name, tensor in tensors.items()
            if held and held.get(module_name(name)) != tuple(tensor.shape)
        ]
        optional = (_EMBEDDINGS, _HEAD, *_VOCABULARY_MAPS)
        given = {module_name(name) for name in tensors}
        missing = (name for name in held if name not in given and not name.endswith(optional))
        faults += [f"{name} is missing" for name in missing]
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
    tensors: Mapping[str, torch.Tensor], algorithm: str, config: Mapping[str, Any], policy_shapes: Shapes
) -> Mapping[str, torch.Tensor]:
    """The draft's tensors without those whose memory is the policy's, and without what a server reads only once.

    Args:
        tensors: Of a version, by the draft's names.
        algorithm: SGLang's speculative algorithm.
        config: config.json of the draft.
        policy_shapes: Of the policy's tensors, by name.

    In SGLang, drafts of the EAGLE family use the policy's own embeddings, and some its head: loading these tensors
    would overwrite the policy. A STANDALONE draft shares nothing.
    """
    if algorithm.upper() == "STANDALONE":
        return tensors
    names = (_EMBEDDINGS, _HEAD) if _shares_head(algorithm, config) else (_EMBEDDINGS,)
    shared = {shape for name, shape in policy_shapes.items() if name.endswith((_EMBEDDINGS, _HEAD))}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_VOCABULARY_MAPS) and not (name.endswith(names) and tuple(tensor.shape) in shared)
    }


def _shares_head(algorithm: str, config: Mapping[str, Any]) -> bool:
    """Whether the draft predicts by the policy's head; an EAGLE-3 head does where its config.json does not size its own
    (`llama_eagle3.py`), or ties it to the embeddings."""
    own = config.get("draft_vocab_size") is not None and not config.get("tie_word_embeddings")
    return not (algorithm.upper() == "EAGLE3" and own)
