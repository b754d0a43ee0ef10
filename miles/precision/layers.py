"""Which matrices of a model a format covers, by name and number of dimensions."""

from __future__ import annotations

import dataclasses
import functools
import re

from miles.precision.megatron_names import ModulePattern, is_kept

HIGH_PRECISION_MODULES = frozenset(
    ("embed_tokens", "wte", "wpe", "lm_head", "head", "gate", "router", "shared_expert_gate", "eh_proj", "weights_proj")
)
"""Last parts of the names of modules that no format covers: embeddings, heads and routers, what joins the inputs of MTP
layers, and the head weights of sparse attention's indexer; published FP8 models keep them too. Norms and biases, which
have one dimension, are not covered either."""
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
    """Modules that are not covered, as config.json of a folder lists them: whole names or their ends, and `re:` begins a
    regular expression that a name begins with."""
    ignores_inside: bool = True
    """Whether a name in `ignored` also stands for the modules inside of that one, and may be any part of their names."""
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
        if any(part in f"{name}.weight" for part in self.but) or self._ignores(name):
            return False
        found = _LAYER.search(name)
        if found is not None and int(found[1]) in self.high_layers:
            return False
        if is_kept(self.modules, name):
            return False
        return not self.only or any(part in f"{name}.weight" for part in self.only)

    def _ignores(self, module: str) -> bool:
        names, expression = _matchers(self.ignored)
        if expression is not None and expression.match(module) is not None:
            return True
        parts = module.split(".") if names else []
        ends = range(1, len(parts) + 1) if self.ignores_inside else (len(parts),)
        return any(".".join(parts[start:end]) in names for end in ends for start in range(end))


EVERY_MATRIX = QuantisedLayers()


@functools.lru_cache(maxsize=16)
def _matchers(ignored: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern[str] | None]:
    """The names among entries, and one expression for all that begin with `re:`."""
    expressions = [entry.removeprefix(_EXPRESSION) for entry in ignored if entry.startswith(_EXPRESSION)]
    names = frozenset(entry for entry in ignored if not entry.startswith(_EXPRESSION))
    return names, re.compile("|".join(f"(?:{each})" for each in expressions)) if expressions else None
