"""PyTorch's attention on a GPU, where the number of rows is another one in each batch."""

from __future__ import annotations

import torch


def leave_out_cudnn() -> None:
    """Have scaled_dot_product_attention of this process take FlashAttention or the memory-efficient kernels.

    On Hopper and Blackwell PyTorch 2.13 takes cuDNN's first, which builds a plan on the host for each new shape
    (`check_prefer_cudnn_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `MHAParams` in
    aten/src/ATen/native/cudnn/MHA.cpp): tens of milliseconds, while batches of responses hardly ever have a shape
    twice.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
