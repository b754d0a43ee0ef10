"""Formats of few bits on a GPU: the bytes of the CPU, and those of TransformerEngine and compressed-tensors.

    python -m pytest -m gpu tests/gpu/test_precision_gpu.py

Takes half a minute.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from format_cases import FORMATS, SHAPES, TYPES, matrices, numbers_that_are_not_finite, random_matrix, same
from packed_weights import comparisons

from miles.precision.nibbles import unpack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="TransformerEngine is not installed"
)
BLOCK_SCALES = {"fp8_block": False, "fp8_block, powers of two": True}
TILED = ((128, 128), (304, 144), (16, 1008))
"""Shapes that TransformerEngine takes: multiples of 16."""


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_cpu(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    chosen = FORMATS[name]
    finite = [(case, weight) for case, weight in matrices(shape, dtype) if weight.isfinite().all()]
    for case, weight in [*finite, *numbers_that_are_not_finite(shape, dtype)]:
        on_gpu = weight.cuda()
        here, there = chosen.quantise(weight), chosen.quantise(on_gpu)
        assert all(part.is_cuda for part in there.values())
        if case != "nan":  # values of a group with NaN are not stated
            assert all(same(here[suffix], there[suffix].cpu()) for suffix in here), case
        assert same(chosen.rounded(weight), chosen.rounded(on_gpu).cpu()), case
        assert same(chosen.rounded_rows(weight), chosen.rounded_rows(on_gpu).cpu()), case
        assert same(chosen.dequantise(there, dtype), chosen.rounded(on_gpu)), case


@pytest.mark.parametrize("name", FORMATS)
def test_views_and_no_rows_are_rounded_too(name: str) -> None:
    chosen, weight = FORMATS[name], random_matrix(144, 304).cuda().T
    assert same(chosen.rounded(weight).cpu(), chosen.rounded(weight.cpu()))
    assert same(chosen.rounded_rows(weight).cpu(), chosen.rounded_rows(weight.cpu()))
    assert chosen.rounded_rows(weight[:0]).shape == (0, 144)


@pytest.mark.parametrize("name", FORMATS)
def test_large_matrices_are_rounded_as_their_rows_are(name: str) -> None:
    """More numbers than an int32 counts."""
    rows = torch.randn(1 << 19, 4224, device="cuda", dtype=torch.bfloat16)
    found = FORMATS[name].rounded_rows(rows)
    for start in (0, (1 << 19) - 128):
        assert same(found[start : start + 128].cpu(), FORMATS[name].rounded_rows(rows[start : start + 128]).cpu())


def block_quantised(weight: torch.Tensor, *, dimensions: int, powers: bool) -> Any:
    """By TransformerEngine."""
    import transformer_engine.pytorch  # noqa: F401  (it loads the library of the next one)
    import transformer_engine_torch
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        fp8_dtype=transformer_engine_torch.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        amax_epsilon=0.0,
        force_pow_2_scales=powers,
        block_scaling_dim=dimensions,
    )
    found = quantizer.make_empty(tuple(weight.shape), dtype=weight.dtype, device="cuda")
    quantizer.update_quantized(weight, found)
    return found


@needs_transformer_engine
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] > 9, reason="emulated by MXFP8")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", TILED)
@pytest.mark.parametrize("name", BLOCK_SCALES)
def test_fp8_blocks_are_those_of_transformer_engine(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    powers, chosen = BLOCK_SCALES[name], FORMATS[name]
    for case, weight in [*matrices(shape, dtype), *numbers_that_are_not_finite(shape, dtype)[:2]]:
        on_gpu = weight.cuda()
        theirs, ours = block_quantised(on_gpu, dimensions=2, powers=powers), chosen.quantise(on_gpu)
        across = ours["_scale_inv"].shape[1]
        assert same(ours[""], theirs._rowwise_data.view(torch.float8_e4m3fn)), case
        assert same(ours["_scale_inv"], theirs._rowwise_scale_inv[:, :across].contiguous()), case
        rows = block_quantised(on_gpu, dimensions=1, powers=powers)
        assert same(chosen.rounded_rows(on_gpu), rows.dequantize(dtype=dtype)), case


@needs_transformer_engine
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", TILED)
def test_nvfp4_is_that_of_transformer_engines_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    quantizer = reference_nvfp4()
    for case, weight in matrices(shape, dtype):
        on_gpu = weight.cuda()
        values, scales = quantizer._quantize(on_gpu)[:2]
        ours = FORMATS["nvfp4"].quantise(on_gpu)
        assert torch.equal(without_signs_of_zeros(ours[""]), without_signs_of_zeros(values.to(torch.uint8))), case
        assert same(ours["_scale"], scales), case


def without_signs_of_zeros(packed: torch.Tensor) -> torch.Tensor:
    """The reference drops the sign of -0, which TransformerEngine's kernels keep as the conversion to E2M1 does."""
    codes = unpack(packed)
    return codes.where(codes != 8, 0)


def reference_nvfp4() -> Any:
    """TransformerEngine's quantiser in PyTorch; its kernels need newer GPUs. Skips where it has none."""
    for module, types in (("reference_nvfp4", "reference_utils"), ("quantization_ref_nvfp4", "utils")):
        path = "transformer_engine.pytorch.custom_recipes."
        if importlib.util.find_spec(path[:-1]) is not None and importlib.util.find_spec(path + module) is not None:
            found = importlib.import_module(path + module).NVFP4QuantizerRef
            e2m1 = importlib.import_module(path + types).Fp4Formats.E2M1
            return found(dtype=e2m1, rowwise=True, columnwise=False, quant_tile_shape=(1, 16))
    pytest.skip("this TransformerEngine has no reference of NVFP4")


def test_packed_weights_are_those_of_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    found = comparisons("cuda")
    assert len(found) == 50
    assert not [name for name, equal in found.items() if not equal]
