"""The table in docs/families.md: which families work where, as configuration checks and other tests say."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import runpy
from collections.abc import Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.checks.model_family import (
    attention_limit,
    why_not_fsdp,
    why_not_megatron,
    why_not_sglang,
    why_not_torch,
)
from miles.config.checks.model_layout import expert_count

TESTS = pathlib.Path(__file__).parents[1] / "integration"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A family of published models."""

    models: str
    published: str
    """A folder of the Hugging Face hub whose config.json is of the type."""
    tiny: str
    """The tiny model of `megatron_models` that stands for it."""


ROWS = (
    Row("DeepSeek R1, V3, V3.1", "deepseek-ai/DeepSeek-R1", "DeepSeek-V3"),
    Row("DeepSeek V3.2", "deepseek-ai/DeepSeek-V3.2", "DeepSeek-V3.2"),
    Row("Qwen 2, 2.5", "Qwen/Qwen2.5-7B-Instruct", "Qwen2, Qwen2.5"),
    Row("Qwen 2 MoE", "Qwen/Qwen2-57B-A14B-Instruct", "Qwen2-MoE"),
    Row("Qwen 3", "Qwen/Qwen3-8B", "Qwen3"),
    Row("Qwen 3 MoE", "Qwen/Qwen3-30B-A3B", "Qwen3-MoE"),
    Row("Llama 3, 3.1, 3.2, 3.3", "meta-llama/Llama-3.3-70B-Instruct", "Llama"),
    Row("Llama 4", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama 4"),
    Row("Gemma 2", "google/gemma-2-9b-it", "Gemma 2"),
    Row("Gemma 3", "google/gemma-3-27b-it", "Gemma 3"),
    Row("Gemma 3n", "google/gemma-3n-E4B-it", "Gemma 3n"),
    Row("GLM 4.5, 4.6, 4.7", "zai-org/GLM-4.6", "GLM-4.5"),
    Row("GLM 4.7 Flash", "zai-org/GLM-4.7-Flash", "GLM-4.7-Flash"),
    Row("MiniMax M2, M2.1", "MiniMaxAI/MiniMax-M2", "MiniMax-M2"),
)
COLUMNS = (
    *("family", "`model_type`", "such as", "fsdp", "megatron, local layers", "in layouts"),
    *("torch engine", "SGLang", "replay"),
)

FP8 = "Published with FP8 weights, which are read as they are."
INSIDE = (
    "Published inside a model that sees or hears: `miles convert hf-to-hf` first takes the text model out. (Gemma 3 of "
    "270M and 1B are text models.)"
)
FORMS = {
    **dict.fromkeys(("DeepSeek-V3", "DeepSeek-V3.2", "MiniMax-M2"), FP8),
    **dict.fromkeys(("Llama 4", "Gemma 3", "Gemma 3n"), INSIDE),
}
FSDP_IF = {
    "DeepSeek-V3.2": "Where `rollout_max_context_len` is at most `index_topk` (2048): up to there the indexer chooses "
    "every row. It is not trained.",
    "Llama 4": "Where `rollout_max_context_len` is at most `attention_chunk_size` and micro-batches have fewer tokens "
    "than `floor_scale` (both 8192).",
}
MEGATRON_IF = {
    "GLM-4.7-Flash": "With `rms_norm_eps` 1e-6. With 1e-5, its default, Transformers norms latents with 1e-6 all the "
    "same, and Megatron-Core and SGLang do not: logits of the tiny model differ by 1e-4.",
}
LIMITS = {
    "index_topk": "2048",
    "attention_chunk_size": "8192",
    "sliding_window": "4096 in Gemma 2, 1024 in Gemma 3 but for 512 in the two smallest, 512 in Gemma 3n",
}
"""As published."""
NOT_ON_CPU = "SGLang implements it with parts that are for GPUs alone, so no real server was tried."


class Notes:
    """Texts below the table, numbered in the order in which they are used."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str | None) -> str:
        """What refers to a text; nothing without one."""
        if text is None:
            return ""
        if text not in self._texts:
            self._texts.append(text)
        return f" [{self._texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for number, text in enumerate(self._texts, 1)]


def family_table(folders: Mapping[str, pathlib.Path], replayed: Mapping[str, bool]) -> str:
    """The table and its notes, of tiny models by family; `replayed`: whether fsdp can replay a family's routing."""
    notes = Notes()
    rows = [_cells(row, read_json_object(folders[row.tiny] / "config.json"), replayed, notes) for row in ROWS]
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, *rows)]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    return "\n".join([*lines, "", *notes.lines()])


def _cells(row: Row, config: dict[str, Any], replayed: Mapping[str, bool], notes: Notes) -> list[str]:
    return [
        row.models + notes.mark(FORMS.get(row.tiny)),
        f"`{config['model_type']}`",
        row.published,
        _yes(notes, why_not_fsdp(config), FSDP_IF.get(row.tiny)),
        _yes(notes, why_not_megatron(config), MEGATRON_IF.get(row.tiny)),
        _layouts(row.tiny),
        _yes(notes, why_not_torch(config), _torch_if(config)),
        _yes(notes, why_not_sglang(config), yes="yes" if _served(row.tiny) else "not tried" + notes.mark(NOT_ON_CPU)),
        _replay(row.tiny, config, replayed[row.tiny]),
    ]


def _yes(notes: Notes, problem: str | None, condition: str | None = None, yes: str = "yes") -> str:
    if problem is None:
        return yes + notes.mark(condition)
    plain = re.sub(r" \((\w+) = .*", r" (`\1` in config.json)", problem)  # without the tiny model's number
    return "no" + notes.mark(plain.replace("it has", "It has") + ".")


def _torch_if(config: dict[str, Any]) -> str | None:
    """Up to which length the torch engine's attention, which sees all tokens, is the model's."""
    found = attention_limit(config)
    return None if found is None else f"Where `rollout_max_context_len` is at most `{found[0]}` ({LIMITS[found[0]]})."


def _layouts(family: str) -> str:
    """The splits in which it trains as in one process, of those that the tests of layouts have."""
    tests = runpy.run_path(str(TESTS / "test_megatron_layouts.py"))
    bases = _bases(tests, family)
    keys = {key for _, base, layout in tests["LAYOUTS"].values() if base in bases for key in layout}
    splits = {"TP": "tensor_model", "EP": "expert_model", "PP": "pipeline_model", "CP": "context"}
    return ", ".join(short for short, key in splits.items() if f"{key}_parallel_size" in keys) or "-"


def _bases(tests: Mapping[str, Any], family: str) -> set[str]:
    bases = {name for name, model in tests["MODELS"].items() if model.split(", MTP")[0] == family}
    return bases | ({"replay", "observed"} if "moe" in bases else set())


def _served(family: str) -> bool:
    """Whether the tests of conformance ask a real server."""
    rows = runpy.run_path(str(TESTS / "test_conformance.py"))["COMBINATIONS"]
    return any((row.family, row.engine) == (family, "sglang") for row in rows)


def _replay(family: str, config: dict[str, Any], replayed: bool) -> str:
    """In which backends; for megatron the tests of layouts say."""
    if not expert_count(config):
        return "dense"
    tests = runpy.run_path(str(TESTS / "test_megatron_layouts.py"))
    able = [("fsdp", replayed), ("megatron", bool(_bases(tests, family) & tests["MOE_LAYERS"].keys()))]
    return ", ".join(name for name, yes in able if yes) or "no"
