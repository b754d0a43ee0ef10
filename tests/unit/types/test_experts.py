"""Expert indices travel in the narrowest type that holds them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.types import expert_dtype, narrow_experts


@pytest.mark.parametrize(("num_experts", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2")])
def test_experts_take_one_byte_up_to_256_and_two_up_to_65536(num_experts: int, dtype: str) -> None:
    assert expert_dtype(num_experts) == np.dtype(dtype)


@settings(deadline=None)
@given(st.integers(1, 65536), st.data(), st.sampled_from([np.int64, np.int32, np.uint16, np.uint32]))
def test_narrowing_changes_no_index(num_experts: int, data: st.DataObject, dtype: type) -> None:
    indices = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=8))
    narrow = narrow_experts(np.array(indices, dtype).reshape(-1, 1, 1), num_experts)
    assert narrow.dtype == expert_dtype(num_experts)
    assert narrow.ravel().tolist() == indices


def test_an_array_of_the_right_type_is_not_copied() -> None:
    indices = np.zeros((3, 2, 1), np.uint8)
    assert narrow_experts(indices, 8) is indices


@pytest.mark.parametrize("bad", [-1, 8, 256])
def test_an_index_without_an_expert_is_named(bad: int) -> None:
    indices = np.zeros((2, 2, 2), np.int32)
    indices[1, 0, 1] = bad
    with pytest.raises(ValueError, match=rf"expert index {bad} at \(1, 0, 1\) is outside \[0, 8\)"):
        narrow_experts(indices, 8)


@pytest.mark.parametrize("num_experts", [0, -1, 65537])
def test_an_impossible_number_of_experts_is_refused(num_experts: int) -> None:
    with pytest.raises(ValueError, match="num_experts"):
        narrow_experts(np.zeros((1, 1, 1), np.int32), num_experts)


def test_indices_must_be_integers() -> None:
    with pytest.raises(TypeError, match="float32"):
        narrow_experts(np.zeros((1, 1, 1), np.float32), 8)
