"""Names of the matrices of routed experts: stored together or each by itself, under the names that families have.

| | names |
|---|---|
| together (module form) | `mlp.experts.gate_up_proj`, `mlp.experts.down_proj` |
| each by itself (checkpoint form) | `mlp.experts.0.gate_proj`, `up_proj`, `down_proj` |
| the same in Mixtral and MiniMax | `block_sparse_moe.experts.0.w1`, `w3`, `w2` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_TOGETHER = re.compile(r"\.experts\.(gate_up|down)_proj$")
_MATRICES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_LAYER = re.compile(r"layers\\?\.\d+")
_LAYERS = re.compile(r"layers\\?\.(?:\d+|\((?:\?:)?\d+(?:\|\d+)*\))(?=\\?\.|$)")
_ANY_NUMBER = re.compile(r"\d|\\[dw]|\[")
_NUMBER = re.compile(r"(?<![w\d])\d+")
_BY_LETTER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_BY_NAME = {letter: name for name, letter in _BY_LETTER.items()}
_MATRIX = re.compile(r"\.experts\.\d+\.(\w+)$")


def matrices_in(module: str, experts: Iterable[int]) -> Iterator[str]:
    """Names of matrices that are stored together under a module's name, of these experts; of others the module's."""
    found = _TOGETHER.search(module)
    if found is None:
        yield module
        return
    for expert in experts:
        for matrix in _MATRICES[found[1]]:
            yield f"{module[: found.start()]}.experts.{expert}.{matrix}"


def spellings(module: str) -> tuple[str, ...]:
    """All names of the same matrix, so that what names it in one form does in the other."""
    found = _MATRIX.search(module)
    leaf = "" if found is None else found[1]
    stem, name = module.removesuffix(leaf), _BY_NAME.get(leaf, leaf)
    long = stem.replace(".block_sparse_moe.", ".mlp.")
    if ".mlp." not in long:
        return (module,)
    return long + name, long.replace(".mlp.", ".block_sparse_moe.") + _BY_LETTER.get(name, name)


def expert_numbers(entry: str) -> list[int]:
    """Numbers in a name, a part of one or a regular expression that may be those of experts.

    They may be anywhere, as in `.1.up_proj` and `experts\\.[1-3]\\.`; layers' and those in w1, w2 and w3 are none.
    """
    return [int(number) for number in _NUMBER.findall(_LAYER.sub("", entry))]


def layers_of(entry: str) -> frozenset[int] | None:
    """Layers in which an entry may name other experts than in the rest, by their numbers; None: it may be any."""
    numbers = frozenset(int(number) for found in _LAYERS.findall(entry) for number in _NUMBER.findall(found))
    rest = _LAYERS.sub("", entry)
    before, experts, after = rest.partition("experts")
    elsewhere = before if experts and "experts" not in after else rest
    return None if "layers" in elsewhere or _ANY_NUMBER.search(elsewhere) is not None else numbers
