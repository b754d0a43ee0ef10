"""What the benchmarks of low precision compute without a GPU: kinds of kernels, and what a run folder says."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks.gpu.fp8_step import KINDS, REST, kind_of, shares_of
from benchmarks.gpu.low_precision import details


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("void transformer_engine::block_scaled_1d_cast_transpose_kernel<true>", "quantising"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("triton_poi_fused_silu_mul_0", "norms and activations"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_Broadcast_RING_LL", REST),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_the_shares_of_a_step_add_up_to_all_kernels() -> None:
    shares = shares_of([("gemm_a", 0.5), ("gemm_b", 0.25), ("unknown", 0.125)])
    assert list(shares) == [*KINDS, REST]
    assert (shares["matrix products"], shares[REST], sum(shares.values())) == (0.75, 0.125, 0.875)


def test_a_run_says_its_differences_bytes_and_memory(tmp_path: pathlib.Path) -> None:
    assert details(tmp_path) == {}
    lines = [
        {
            "perf/step_time": 1.0,
            "rollout/raw_reward": float(step),
            "train/train_rollout_logprob_abs_diff_max": 0.5 if step == 0 else 0.1,
            "perf/update_weights_gb": 0.25,
            "perf/offload_rollout_gb": 2.0,
        }
        for step in range(10)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "memory.csv").write_text("1.0,100\n2.0,2000\n3.0,50\n")
    (tmp_path / "logs").mkdir()
    loaded = (
        "Load weight end. elapsed=0.1 s, type=Glm4MoeForCausalLM, quant=fp8, avail mem=134.40 GB, mem usage=0.62 GB."
    )
    (tmp_path / "logs" / "rollout-0-sglang-0.log").write_text(f"begin\n{loaded}\nend\n")
    assert details(tmp_path) == pytest.approx(
        {
            "largest_diff": 0.5,
            "usual_largest_diff": 0.1,
            "first_reward": 0.5,
            "last_reward": 8.5,
            "update_gb": 0.25,
            "engine_gb": 2.0,
            "engine_weights_gb": 0.62,
            "most_gb": 2000 * 2**20 / 1e9,
        }
    )
