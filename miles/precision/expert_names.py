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
_NUMBER = re.compile(r"(?<![A-Za-z_])experts\\?\.(\d+)")
_BY_LETTER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_BY_NAME = {letter: name for name, letter in _BY_LETTER.items()}
_MATRIX = re.compile(r"(?<=\.experts\.)(\d+)\.(\w+)$")


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
    long = _MATRIX.sub(lambda m: f"{m[1]}.{_BY_NAME.get(m[2], m[2])}", module).replace(".block_sparse_moe.", ".mlp.")
    if ".mlp." not in long:
        return (module,)
    short = _MATRIX.sub(lambda m: f"{m[1]}.{_BY_LETTER.get(m[2], m[2])}", long).replace(".mlp.", ".block_sparse_moe.")
    return long, short


def expert_numbers(entry: str) -> list[int]:
    """Numbers of experts in a name, a part of one or a regular expression."""
    return [int(number) for number in _NUMBER.findall(entry)]
