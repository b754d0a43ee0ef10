"""Which layers each pipeline stage has, as Megatron-Core splits them by its settings (transformer_block.py)."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any


class SplitError(ValueError):
    """A split does not fit a number of layers: the setting to blame, its value, the problem and the way out."""

    def __init__(self, setting: str, value: Any, problem: str, remedy: str) -> None:
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting} = {value}, but {problem}; {remedy}")


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineSplit:
    """How a model's layers are split over pipeline ranks, each of which has one or several virtual stages."""

    stages: int = 1
    virtual: int | None = None
    """Virtual stages of each rank."""
    virtual_layers: int | None = None
    """Layers of a virtual stage, in place of their number."""
    first: int | None = None
    """Layers of the first rank."""
    last: int | None = None
    """Layers of the last rank."""
    with_embedding: bool = False
    """Whether the embeddings count as a layer."""
    with_loss: bool = False
    """Whether the head counts as a layer."""
    layout: str | None = None
    """Every stage spelt out."""

    @property
    def is_even(self) -> bool:
        """Whether every stage has as many layers as the others."""
        parts = (self.first, self.last, self.layout, self.with_embedding or None, self.with_loss or None)
        return all(part is None for part in parts)

    def virtual_stages(self, layers: int) -> int:
        """Virtual stages of each rank, 1 without any. Raises SplitError when it does not fit so many layers."""
        return len(self._counts(layers))

    def layers_of(self, stage: int, layers: int) -> list[int]:
        """Numbers of a rank's layers, from 0; virtual stages take turns. Raises SplitError."""
        counts = [count for row in self._counts(layers) for count in row]
        ends = list(itertools.accumulate(counts))
        own = range(stage, len(counts), self.stages)
        return [layer for turn in own for layer in range(ends[turn] - counts[turn], ends[turn])]

    def _counts(self, layers: int) -> list[list[int]]:
        """Layers by virtual stage and rank, in the order in which a micro-batch passes them."""
        if self.layout is not None:
            return self._spelt_out(self.layout, layers)
        ranks = self._by_rank(layers)
        virtual = self._virtual(ranks)
        if virtual > 1 and self.stages == 2 and None not in (self.first, self.last):
            problem = "decoder_first_pipeline_num_layers says it too, and Megatron-Core takes one with virtual stages"
            raise SplitError("decoder_last_pipeline_num_layers", self.last, problem, "leave one of them out")
        for count in ranks:
            if count % virtual:
                raise SplitError(
                    "num_virtual_stages_per_pipeline_rank",
                    virtual,
                    f"it does not divide the {count} layers of a stage",
                    "choose one that does",
                )
        counts = [[count // virtual for count in ranks] for _ in range(virtual)]
        counts[0][0] -= self.with_embedding
        counts[-1][-1] -= self.with_loss
        return counts

    def _by_rank(self, layers: int) -> list[int]:
        """Layers of each rank, with embeddings and head where they count."""
        given = [count for count in (self.first, self.last) if count is not None]
        others, left = self.stages - len(given), layers - sum(given) + self.with_embedding + self.with_loss
        if left < others or (others == 0 and left) or (others and left % others):
            if not given:
                what = "layers" if left == layers else "layers, with embeddings or head counted as layers,"
                problem = f"it does not divide the model's {left} {what}".rstrip(",")
                remedy = "choose one that does, or set decoder_last_pipeline_num_layers"
                raise SplitError("pipeline_model_parallel_size", self.stages, problem, remedy)
            name = "last" if self.first is None else "first"
            problem = f"it leaves {left} of the model's {layers} layers for {others} other stages"
            remedy = "choose one that leaves as many for each"
            raise SplitError(f"decoder_{name}_pipeline_num_layers", getattr(self, name), problem, remedy)
        middle = left // others if others else 0
        start = [] if self.first is None else [self.first]
        end = [] if self.last is None else [self.last]
        return [*start, *[middle] * others, *end]

    def _virtual(self, ranks: list[int]) -> int:
        if self.virtual_layers is None:
            return self.virtual or 1
        if ranks[0] % self.virtual_layers:
            problem = f"it does not divide the {ranks[0]} layers of a stage"
            key = "num_layers_per_virtual_pipeline_stage"
            raise SplitError(key, self.virtual_layers, problem, "choose one that does")
        return ranks[0] // self.virtual_layers

    def _spelt_out(self, layout: str, layers: int) -> list[list[int]]:
        def wrong(problem: str, remedy: str) -> SplitError:
            return SplitError("pipeline_model_parallel_layout", layout, problem, remedy)

        text = _unrolled(layout)
        unknown = sorted(set(text) - set("EtL|"))
        if "m" in unknown:
            raise wrong("MTP layers are always with the last stage", "leave m out")
        if unknown:
            raise wrong(f"it has {' '.join(unknown)}", "write E, t, L and | with (…)*n and t*n")
        if not (text.startswith("E") and text.endswith("L") and text.count("E") == text.count("L") == 1):
            raise wrong("E begins the first stage and L ends the last one", "write both, once")
        if text.count("t") != layers:
            problem = f"it has {text.count('t')} layers (t), and the model {layers}"
            raise wrong(problem, f"write {layers} of them")
        if "||" in text:
            raise wrong("a stage has nothing", "write one | between stages")
        counts = [part.count("t") for part in text.split("|")]
        if len(counts) % self.stages:
            problem = f"pipeline_model_parallel_size = {self.stages} does not divide its {len(counts)} stages"
            raise wrong(problem, "write a multiple of that")
        virtual = len(counts) // self.stages
        if self.virtual is not None and self.virtual != virtual:
            problem = f"pipeline_model_parallel_layout has {virtual} for each rank"
            remedy = "leave it out"
            raise SplitError("num_virtual_stages_per_pipeline_rank", self.virtual, problem, remedy)
        return [counts[turn * self.stages : (turn + 1) * self.stages] for turn in range(virtual)]


def split_of(settings: Any) -> PipelineSplit:
    """The split that settings ask for: the section `megatron`, or all settings."""
    return PipelineSplit(
        stages=settings.pipeline_model_parallel_size,
        virtual=settings.num_virtual_stages_per_pipeline_rank,
        virtual_layers=settings.num_layers_per_virtual_pipeline_stage,
        first=settings.decoder_first_pipeline_num_layers,
        last=settings.decoder_last_pipeline_num_layers,
        with_embedding=settings.account_for_embedding_in_pipeline_split,
        with_loss=settings.account_for_loss_in_pipeline_split,
        layout=settings.pipeline_model_parallel_layout,
    )


def _unrolled(layout: str) -> str:
    """The layout without repetitions, commas and spaces."""
    text = re.sub(r"[,\s]", "", layout)
    for part in (r"\(([^()]*)\)\*(\d+)", r"([^\d*()])\*(\d+)"):
        text = re.sub(part, lambda found: found[1] * int(found[2]), text)
    return text
