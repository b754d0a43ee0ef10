"""The set of tokens at each position, from the student's likeliest and the teacher's.

Dims: T response tokens, K likeliest of either, M = K or 2 K places of a set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
NO_TOKEN = -1
"""In the place of a token that is no member."""
STUDENTS = frozenset({"only-student", "intersection", "union", "xor"})
"""Strategies that need the student's likeliest tokens,"""
TEACHERS = frozenset({"only-teacher", "intersection", "union", "xor"})
"""and those that need the teacher's."""
UNWEIGHED = frozenset({"xor"})
"""Strategies whose weights are not divided by their sum."""


def choose_tokens(strategy: str, student_TK: Ids | None, teacher_TK: Ids | None) -> Ids:
    """Choose the members; int32 [T, M], `NO_TOKEN` elsewhere. The student's come first.

    Raises ValueError when the likeliest tokens that a strategy needs are missing.
    """
    if (student_TK is None and strategy in STUDENTS) or (teacher_TK is None and strategy in TEACHERS):
        raise ValueError(f"opd_top_k_strategy = {strategy} needs likeliest tokens that are missing")
    if strategy == "only-student":
        assert student_TK is not None
        return student_TK
    if strategy == "only-teacher":
        assert teacher_TK is not None
        return teacher_TK
    assert student_TK is not None
    assert teacher_TK is not None
    both_TK = _in(student_TK, teacher_TK)
    if strategy == "intersection":
        return np.where(both_TK, student_TK, NO_TOKEN)
    others_TK = np.where(_in(teacher_TK, student_TK), NO_TOKEN, teacher_TK)
    own_TK = student_TK if strategy == "union" else np.where(both_TK, NO_TOKEN, student_TK)
    return np.concatenate([own_TK, others_TK], axis=1)


def pick(ids_TM: Ids, known_TK: Ids, values_TK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Look up the values of tokens where they are among the known ones, NaN elsewhere; float32 [T, M]."""
    same_TMK = ids_TM[:, :, None] == known_TK[:, None, :]
    found_TM = np.where(same_TMK, values_TK[:, None, :], np.float32(0)).sum(axis=2, dtype=np.float32)
    return np.where(same_TMK.any(axis=2), found_TM, np.float32(np.nan))


def _in(ids_TK: Ids, others_TK: Ids) -> npt.NDArray[np.bool_]:
    """Whether each token is among the others of its position."""
    found_TK: npt.NDArray[np.bool_] = (ids_TK[:, :, None] == others_TK[:, None, :]).any(axis=2)
    return found_TK
