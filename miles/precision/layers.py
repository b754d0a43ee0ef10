"""Which matrices of a model a format covers, by name and number of dimensions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator

from miles.precision.expert_names import expert_numbers, layers_of, matrices_in, spellings
from miles.precision.megatron_names import ModulePattern, is_kept

_EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer", "wte", "wpe")
_ROUTERS = ("gate", "router", "shared_expert_gate", "modality_router", "correction_coefs", "prediction_coefs")
_MTP_INPUTS = ("eh_proj", "input_proj")
HIGH_PRECISION_MODULES = frozenset((*_EMBEDDINGS, *_ROUTERS, *_MTP_INPUTS, "lm_head", "head", "weights_proj"))
"""Last parts of the names of modules that no format covers: embeddings, heads and routers, what joins the inputs of MTP
layers, and the head weights of sparse attention's indexer, which SGLang has in 16 bits too. Gemma 3n's coefficients
are a few numbers for each token. Norms and biases, which have one dimension, are not covered either."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPRESSION = "re:"


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that a tensor or module of this name is in; None for one in none."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedLayers:
    """Names are those of a Hugging Face model, in the module form or the checkpoint form (`miles.weights.naming`)."""

    only: tuple[str, ...] = ()
    """Parts of names, one of which a covered matrix has; empty: any name."""
    but: tuple[str, ...] = ()
    """Parts of names that no covered matrix has."""
    ignored: tuple[str, ...] = ()
    """Modules that are not covered, as config.json of a folder lists them: whole names or their ends, and `re:` begins
    a regular expression that a name begins with."""
    ignores_inside: bool = True
    """Whether a name in `ignored` also stands for the modules inside of that one, and may be any part of their
    names."""
    high_layers: frozenset[int] = frozenset()
    """Numbers of decoder layers of which nothing is covered."""
    modules: tuple[ModulePattern, ...] = ()
    """Patterns of Megatron-Core's names of modules, some of which leave matrices out."""

    def cover(self, name: str, dimensions: int) -> bool:
        """Whether the tensor of this name is a matrix that is quantised.

        A tensor in which matrices of experts are stored together is covered if these are, and so is each of them by its
        own name. Raises ValueError where only some are: of the first two experts and those with numbers that entries
        have. `cover_experts` asks for all.
        """
        module = name.removesuffix(".weight")
        if dimensions < 2 or module.rpartition(".")[2] in HIGH_PRECISION_MODULES:
            return False
        return self._cover_alike(name, module, self._expert_numbers)

    def cover_experts(self, name: str, experts: int) -> bool:
        """Whether the tensor of this name is quantised, in which the matrices of so many experts are stored together.

        Raises ValueError where only some are. Takes milliseconds for hundreds of experts.
        """
        return self._cover_alike(name, name, range(experts))

    def layers_to_ask(self, layers: Iterable[int]) -> frozenset[int]:
        """Of layers with experts, those to ask `cover_experts` for, since it answers alike for the others."""
        known, named = frozenset(layers) - self.high_layers, set[int]()
        entries = (*self.only, *self.but, *self.ignored)
        if not any(entry.startswith(_EXPRESSION) or expert_numbers(entry) for entry in entries):
            return frozenset()  # each names all experts of a layer, or none
        for entry in entries:
            numbers = layers_of(entry)
            if numbers is None and entry.startswith(_EXPRESSION):
                return known
            named |= numbers or frozenset()
        rest = sorted(known - named)
        return known & named | {*rest[:1], *rest[-1:]}

    def _cover_alike(self, name: str, module: str, experts: Iterable[int]) -> bool:
        answers: dict[bool, str] = {}
        for matrix in matrices_in(module, experts):
            answers.setdefault(self._covers(matrix), matrix)
        if len(answers) == 2:
            problem = f"{name} holds {answers[True]}, which is quantised, and {answers[False]}, which is not"
            settings = "int4_layers, extra_high_precision_layers_hf and the modules that config.json ignores"
            raise ValueError(f"{problem}; have {settings} name all matrices of its experts, or none")
        return True in answers

    def _covers(self, module: str) -> bool:
        if layer_of(module) in self.high_layers:
            return False
        modules = spellings(module)
        names = [f"{spelling}.weight" for spelling in modules]
        if any(part in name for part in self.but for name in names) or any(map(self._ignores, modules)):
            return False
        if self.modules and any(is_kept(self.modules, spelling) for spelling in modules):
            return False
        return not self.only or any(part in name for part in self.only for name in names)

    def _ignores(self, module: str) -> bool:
        if self._expression is not None and self._expression.match(module) is not None:
            return True
        parts = module.split(".") if self._names else []
        for size in self._sizes:
            last = len(parts) - size
            starts = range(0 if self.ignores_inside else max(last, 0), last + 1)
            if any(".".join(parts[start : start + size]) in self._names for start in starts):
                return True
        return False

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(entry for entry in self.ignored if not entry.startswith(_EXPRESSION))

    @functools.cached_property
    def _sizes(self) -> frozenset[int]:
        """How many parts names have: thousands of names have few sizes."""
        return frozenset(name.count(".") + 1 for name in self._names)

    @functools.cached_property
    def _expression(self) -> re.Pattern[str] | None:
        """One expression for all that begin with `re:`."""
        found = [entry.removeprefix(_EXPRESSION) for entry in self.ignored if entry.startswith(_EXPRESSION)]
        return re.compile("|".join(f"(?:{each})" for each in found)) if found else None

    @functools.cached_property
    def _expert_numbers(self) -> tuple[int, ...]:
        """Those of experts that are named, and of the first two, as every model with experts has."""
        named: Iterator[str] = (entry for entries in (self.only, self.but, self.ignored) for entry in entries)
        return tuple(sorted({0, 1, *(number for entry in named for number in expert_numbers(entry))}))


EVERY_MATRIX = QuantisedLayers()
