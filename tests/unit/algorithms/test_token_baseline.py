import dataclasses
import math
from collections import defaultdict

import pytest
import torch

from miles.algorithms import AdvantageBatch, AdvantageConfig, Packing, compute_advantages

OTB = AdvantageConfig(advantage_estimator="optimal_token_baseline")


def advantages(batch: AdvantageBatch) -> list[float]:
    return compute_advantages(OTB, batch).advantages_T.tolist()


def batch_of(
    lengths: tuple[int, ...], rewards: list[float], groups: list[int], mask: list[int] | None = None, seed: int = 0
) -> AdvantageBatch:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 2 * torch.randn(sum(lengths), 6, generator=generator, dtype=torch.float64)
    return AdvantageBatch(
        packing=Packing(lengths),
        mask_T=torch.ones(sum(lengths)) if mask is None else torch.tensor(mask),
        rewards_B=torch.tensor(rewards),
        old_log_probs_T=logits_TV.log_softmax(-1)[:, 0],
        squared_probs_T=logits_TV.softmax(-1).square().sum(-1),
        group_ids_B=torch.tensor(groups),
        num_groups=max(groups) + 1,
    )


def test_a_groups_baseline_by_hand() -> None:
    # Energies 1 - 2 p + sum p^2. Sample 0: 0.5 and 0.5; sample 1: 1.5 alone.
    batch = AdvantageBatch(
        packing=Packing((2, 1)),
        mask_T=torch.ones(3),
        rewards_B=torch.tensor([1.0, 0.0]),
        old_log_probs_T=torch.tensor([0.5, 0.4, 0.05]).log(),
        squared_probs_T=torch.tensor([0.5, 0.3, 0.6]),
        group_ids_B=torch.tensor([0, 0]),
        num_groups=1,
    )
    baseline = (1 * 0.5 + 0 * 1.5) / (0.5 + 1.5)
    # Sample 0 alone reaches the second position, and keeps its return there.
    assert advantages(batch) == pytest.approx([1 - baseline, 1.0, -baseline], abs=1e-6)


def test_baselines_follow_the_papers_formula() -> None:
    lengths, rewards, groups = (4, 2, 3, 5, 1, 4), [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], [0, 1, 0, 1, 1, 0]
    mask = [1] * 4 + [1, 1] + [0, 1, 1] + [1, 0, 0, 1, 1] + [1] + [1] * 4  # turns of a tool are left out
    batch = batch_of(lengths, rewards, groups, mask)
    assert batch.old_log_probs_T is not None
    assert batch.squared_probs_T is not None
    energies: list[list[float]] = []
    at = 0
    for n in lengths:
        gathered, total = [], 0.0
        for t in range(at, at + n):
            if mask[t]:
                total += 1 - 2 * math.exp(batch.old_log_probs_T[t]) + float(batch.squared_probs_T[t])
                gathered.append(total)
        energies.append(gathered)
        at += n
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for gathered, reward, group in zip(energies, rewards, groups, strict=True):
        for position, weight in enumerate(gathered):
            sums[group, position][0] += reward * weight
            sums[group, position][1] += weight
            sums[group, position][2] += 1
    expected = []
    for i, n in enumerate(lengths):
        start, position = sum(lengths[:i]), 0
        for t in range(start, start + n):
            weighted, total, count = sums[groups[i], position]
            expected.append((rewards[i] - (weighted / total if count > 1 else 0.0)) * mask[t])
            position += mask[t]
    assert advantages(batch) == pytest.approx(expected, abs=1e-6)


def test_a_sample_with_a_group_to_itself_keeps_its_return() -> None:
    assert advantages(batch_of((2, 3, 3), [0.25, 1.0, 1.0], [0, 1, 1])) == pytest.approx(
        [0.25] * 2 + [0.0] * 6, abs=1e-6
    )


def test_the_baseline_has_the_least_variance_of_gradients() -> None:
    # Two responses of one token, equally likely; their gradients' squared norms are the energies. The variance of
    # g (G - b) around its mean, summed over both, is smallest at the baseline.
    batch = batch_of((1, 1), [1.0, 0.2], [0, 0], seed=4)
    assert batch.old_log_probs_T is not None
    assert batch.squared_probs_T is not None
    energy = (1 - 2 * batch.old_log_probs_T.exp() + batch.squared_probs_T).tolist()
    best = 1.0 - advantages(batch)[0]

    def second_moment(b: float) -> float:
        return energy[0] * (1.0 - b) ** 2 + energy[1] * (0.2 - b) ** 2

    assert second_moment(best) < second_moment(best + 0.01)
    assert second_moment(best) < second_moment(best - 0.01)


@pytest.mark.parametrize("missing", ["old_log_probs_T", "squared_probs_T", "group_ids_B"])
def test_what_the_batch_lacks_is_named(missing: str) -> None:
    batch = dataclasses.replace(batch_of((1, 1), [1.0, 0.0], [0, 0]), **{missing: None})
    with pytest.raises(ValueError, match=f"needs AdvantageBatch.{missing}"):
        compute_advantages(OTB, batch)
