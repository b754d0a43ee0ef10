"""Which matrices of a model a format covers, by name and number of dimensions."""

from __future__ import annotations

import dataclasses
import re

from miles.precision.megatron_names import ModulePattern, is_kept

HIGH_PRECISION_MODULES = ("embed_tokens", "wte", "wpe", "lm_head", "gate", "router", "shared_expert_gate")
"""Last parts of the names of modules that no format covers: embeddings, head and routers. Norms and biases, which have
one dimension, are not covered either."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPRESSION = "re:"
_FUSED = re.compile(r"\.experts\.(gate_up|down)_proj$")
_FIRST_EXPERT = {"gate_up": ".experts.0.gate_proj", "down": ".experts.0.down_proj"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedLayers:
    """Names are those of a Hugging Face model, in the module form or the checkpoint form (`miles.weights.naming`)."""

    only: tuple[str, ...] = ()
    """Parts of names, one of which a covered matrix has; empty: any name."""
    but: tuple[str, ...] = ()
    """Parts of names that no covered matrix has."""
    ignored: tuple[str, ...] = ()
    """Modules that are not covered, as config.json of a folder lists them: a name stands for the module and those
    inside, and `re:` begins a regular expression that a name begins with."""
    high_layers: frozenset[int] = frozenset()
    """Numbers of decoder layers of which nothing is covered."""
    modules: tuple[ModulePattern, ...] = ()
    """Patterns of Megatron-Core's names of modules, some of which leave matrices out."""

    def cover(self, name: str, dimensions: int) -> bool:
        """Whether the tensor of this name is a matrix that is quantised.

        Experts held in one tensor are asked for by the name of the first one's matrix.
        """
        name = _FUSED.sub(lambda found: _FIRST_EXPERT[found[1]], name.removesuffix(".weight"))
        if dimensions < 2 or name.rpartition(".")[2] in HIGH_PRECISION_MODULES:
            return False
        if any(part in f"{name}.weight" for part in self.but) or any(_holds(entry, name) for entry in self.ignored):
            return False
        found = _LAYER.search(name)
        if found is not None and int(found[1]) in self.high_layers:
            return False
        if is_kept(self.modules, name):
            return False
        return not self.only or any(part in f"{name}.weight" for part in self.only)


EVERY_MATRIX = QuantisedLayers()


def _holds(entry: str, module: str) -> bool:
    if entry.startswith(_EXPRESSION):
        return re.match(entry.removeprefix(_EXPRESSION), module) is not None
    return module == entry or module.startswith(f"{entry}.")
