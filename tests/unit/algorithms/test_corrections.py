import math

import pytest
import torch

from miles.algorithms import (
    Correction,
    CorrectionMethod,
    IcePop,
    MaskedImportanceSampling,
    Packing,
    TruncatedImportanceSampling,
    compute_correction,
    mismatch_metrics,
)

# Sample 0: ratios 4, 1, 0.25 (the last is masked); sample 1: ratios 0.2, 2.5.
PACKING = Packing((3, 2))
MASK_T = torch.tensor([1, 1, 0, 1, 1])
RATIOS = [4.0, 1.0, 0.25, 0.2, 2.5]
GEOMETRIC = [2.0, 2.0, 2.0, math.sqrt(0.5), math.sqrt(0.5)]
SEQUENCE = [4.0, 4.0, 4.0, 0.5, 0.5]


def correct(
    method: CorrectionMethod,
    ratios: list[float] = RATIOS,
    packing: Packing = PACKING,
    mask_T: torch.Tensor = MASK_T,
    dtype: torch.dtype = torch.float64,
) -> Correction:
    rollout_T = -torch.ones(len(ratios), dtype=dtype)
    train_T = rollout_T + torch.tensor(ratios, dtype=torch.float64).log().to(dtype)
    return compute_correction(
        method, train_log_probs_T=train_T, rollout_log_probs_T=rollout_T, mask_T=mask_T, packing=packing
    )


def unmasked(x_T: torch.Tensor | None) -> list[float]:
    assert x_T is not None
    return x_T[MASK_T.bool()].tolist()


def kept(values: list[float]) -> list[float]:
    return [v for v, m in zip(values, MASK_T.tolist(), strict=True) if m]


def test_truncated_importance_sampling_by_hand() -> None:
    result = correct(TruncatedImportanceSampling())
    assert unmasked(result.weights_T) == pytest.approx([2.0, 1.0, 0.2, 2.0])
    assert result.keep_T is None
    assert unmasked(result.metrics_T["tis"]) == pytest.approx([4.0, 1.0, 0.2, 2.5])
    assert unmasked(result.metrics_T["tis_clipfrac"]) == [1, 0, 0, 1]
    assert unmasked(result.metrics_T["tis_abs"]) == pytest.approx([3.0, 0.0, 0.8, 1.5])


def test_the_lower_bound_of_truncation_raises_weights() -> None:
    result = correct(TruncatedImportanceSampling(tis_clip_low=0.5, tis_clip=3.0))
    assert unmasked(result.weights_T) == pytest.approx([3.0, 1.0, 0.5, 2.5])


def test_icepop_zeroes_weights_out_of_range() -> None:
    result = correct(IcePop(tis_clip_low=0.5, tis_clip=2.5))
    assert unmasked(result.weights_T)[:3] == pytest.approx([0.0, 1.0, 0.0])
    assert unmasked(result.metrics_T["tis_clipfrac"])[:3] == [1, 0, 1]


@pytest.mark.parametrize(("level", "ratios"), [("token", RATIOS), ("sequence", SEQUENCE), ("geometric", GEOMETRIC)])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_weights_of_every_level_and_mode(level: str, ratios: list[float], mode: str) -> None:
    method = MaskedImportanceSampling(
        tis_level=level, tis_mode=mode, tis_lower_bound=0.6, tis_upper_bound=1.8, use_rs=False
    )
    result = correct(method)
    bounded = {
        "truncate": [min(r, 1.8) for r in ratios],
        "clip": [min(max(r, 0.6), 1.8) for r in ratios],
        "mask": ratios,
    }[mode]
    assert unmasked(result.weights_T) == pytest.approx(kept(bounded))
    accepted = [mode != "mask" or 0.6 <= r <= 1.8 for r in ratios]
    assert unmasked(result.keep_T) == kept(accepted)


@pytest.mark.parametrize(("level", "ratios"), [("token", RATIOS), ("sequence", SEQUENCE), ("geometric", GEOMETRIC)])
def test_rejection_has_its_own_level_and_bounds(level: str, ratios: list[float]) -> None:
    method = MaskedImportanceSampling(rs_level=level, rs_lower_bound=0.6, rs_upper_bound=3.0)
    result = correct(method)
    assert unmasked(result.weights_T) == pytest.approx([2.0, 1.0, 0.2, 2.0])
    assert unmasked(result.keep_T) == kept([0.6 <= r <= 3.0 for r in ratios])


def test_bounds_default_to_the_inverse_and_to_those_of_weighting() -> None:
    method = MaskedImportanceSampling(tis_upper_bound=4.0)
    assert method.tis_bounds == (0.25, 4.0)
    assert method.rs_bounds == (0.25, 4.0)
    assert MaskedImportanceSampling(tis_lower_bound=0.5, rs_upper_bound=9.0).rs_bounds == (0.5, 9.0)


def test_rejection_without_weighting_leaves_weights_out() -> None:
    result = correct(MaskedImportanceSampling(use_tis=False, rs_upper_bound=3.0, rs_lower_bound=0.1))
    assert result.weights_T is None
    assert unmasked(result.keep_T) == [False, True, True, True]


def test_one_catastrophic_token_vetoes_its_sequence() -> None:
    wide = {"rs_lower_bound": 1e-9, "rs_upper_bound": 1e9}
    ratios = [1.0, 1.0, 1e-6, 1e-6, 1.0]
    result = correct(MaskedImportanceSampling(rs_veto_threshold=1e-4, **wide), ratios)
    # The catastrophic token of sample 0 is masked and vetoes nothing.
    assert unmasked(result.keep_T) == [True, True, False, False]
    assert unmasked(result.metrics_T["mis_catastrophic_token_fraction"]) == [0, 0, 1, 0]
    assert unmasked(result.metrics_T["mis_catastrophic_seq_fraction"]) == [0, 0, 1, 1]
    assert unmasked(correct(MaskedImportanceSampling(**wide), ratios).keep_T) == [True] * 4


def test_batch_normalisation_gives_weights_of_mean_one() -> None:
    by_token = correct(MaskedImportanceSampling(tis_batch_normalize=True, use_rs=False))
    mean = (2.0 + 1.0 + 0.2 + 2.0) / 4
    assert unmasked(by_token.weights_T) == pytest.approx([w / mean for w in (2.0, 1.0, 0.2, 2.0)])
    for level, ratios in (("sequence", (2.0, 0.5)), ("geometric", (2.0, math.sqrt(0.5)))):
        result = correct(MaskedImportanceSampling(tis_level=level, tis_batch_normalize=True, use_rs=False))
        a, b = (r / (sum(ratios) / 2) for r in ratios)
        assert unmasked(result.weights_T) == pytest.approx([a, a, b, b])


def test_huge_log_ratios_are_clamped_before_the_exponential() -> None:
    method = MaskedImportanceSampling(tis_upper_bound=1e12, use_rs=False)
    result = correct(method, [math.exp(50), math.exp(-50), 1.0, 1.0, 1.0])
    assert unmasked(result.weights_T)[:2] == pytest.approx([math.exp(20), math.exp(-20)])
    assert all(x_T.isfinite().all() for x_T in result.metrics_T.values())


@pytest.mark.parametrize(
    "method",
    [
        TruncatedImportanceSampling(),
        IcePop(),
        MaskedImportanceSampling(
            tis_level="geometric", rs_level="sequence", rs_veto_threshold=1e-4, tis_batch_normalize=True
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_garbage_fully_masked_samples_and_half_precision(method: CorrectionMethod, dtype: torch.dtype) -> None:
    mask_T = torch.tensor([1, 1, 0, 0, 0])
    clean = correct(method, [1.5, 0.9, 1.0, 1.0, 1.0], mask_T=mask_T, dtype=dtype)
    dirty = correct(method, [1.5, 0.9, math.nan, math.inf, 0.0], mask_T=mask_T, dtype=dtype)
    assert clean.weights_T is not None
    assert dirty.weights_T is not None
    assert clean.weights_T.dtype == torch.float32
    assert torch.equal(clean.weights_T[:2], dirty.weights_T[:2])
    assert dirty.weights_T.isfinite().all()


def test_equal_log_probs_need_no_correction() -> None:
    for method in (TruncatedImportanceSampling(), IcePop(), MaskedImportanceSampling(tis_batch_normalize=True)):
        result = correct(method, [1.0] * 5)
        assert unmasked(result.weights_T) == [1.0] * 4
        assert result.keep_T is None or bool(result.keep_T.all())


def test_mismatch_metrics_by_hand() -> None:
    packing, mask_T = Packing((2,)), torch.ones(2, dtype=torch.bool)
    train_T = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    rollout_T = torch.tensor([-1.5, -1.7], dtype=torch.float64)
    metrics = {name: x_T.tolist() for name, x_T in mismatch_metrics(train_T, rollout_T, mask_T, packing).items()}
    a, b = 0.5, -0.3
    expected = {
        "mis_training_log_ppl": [1.5] * 2,
        "mis_training_ppl": [math.exp(1.5)] * 2,
        "mis_rollout_log_ppl": [1.6] * 2,
        "mis_rollout_ppl": [math.exp(1.6)] * 2,
        "mis_log_ppl_diff": [-0.1] * 2,
        "mis_log_ppl_abs_diff": [0.1] * 2,
        "mis_ppl_ratio": [math.exp(-0.1)] * 2,
        "mis_chi2_token": [(math.exp(2 * a) + math.exp(2 * b)) / 2 - 1] * 2,
        "mis_chi2_seq": [math.exp(2 * (a + b)) - 1] * 2,
        "mis_kl": [-a, -b],
        "mis_k3_kl": [math.exp(a) - a - 1, math.exp(b) - b - 1],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(values, abs=1e-9), name


def test_a_correction_is_taken_apart_by_sample() -> None:
    whole = correct(MaskedImportanceSampling())
    part = whole.take(PACKING, [1])
    alone = correct(MaskedImportanceSampling(), RATIOS[3:], Packing((2,)), MASK_T[3:])
    assert part.weights_T is not None
    assert part.keep_T is not None
    assert torch.equal(part.weights_T, alone.weights_T)
    assert torch.equal(part.keep_T, alone.keep_T)
    assert part.metrics_T.keys() == alone.metrics_T.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tis_level": "word"}, "tis_level is 'word'; choose from token, sequence, geometric"),
        ({"tis_mode": "drop"}, "tis_mode is 'drop'"),
        ({"tis_lower_bound": 3.0}, "tis_lower_bound is 3.0 and tis_upper_bound 2.0"),
        ({"rs_lower_bound": 5.0}, "rs_lower_bound is 5.0"),
    ],
)
def test_faulty_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedImportanceSampling(**options)
