"""Which kernels PyTorch's attention may take."""

from __future__ import annotations

import torch

from miles.algorithms.any_shape_attention import leave_out_cudnn


def test_kernels_that_are_built_for_each_shape_are_left_out() -> None:
    cuda = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    try:
        cuda.enable_cudnn_sdp(True)
        leave_out_cudnn()
        assert not cuda.cudnn_sdp_enabled()
        assert cuda.flash_sdp_enabled()
        assert cuda.mem_efficient_sdp_enabled()
    finally:
        cuda.enable_cudnn_sdp(before)
