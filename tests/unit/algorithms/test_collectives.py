"""Two real gloo processes give what one process gives over all of the data."""

import itertools
import os
import pathlib
import subprocess
import sys

import algorithm_reference as reference
import pytest
import torch
import torch.distributed as dist

from miles.algorithms import (
    ESTIMATORS,
    AdvantageBatch,
    AdvantageConfig,
    LossBatch,
    LossConfig,
    MaskedImportanceSampling,
    Packing,
    VocabShard,
    compute_advantages,
    compute_correction,
    linear_token_log_probs,
    masked_whiten,
    reduce_metrics,
    rl_loss,
    sum_squared_probs,
    token_log_probs,
)

WORLD = 2
PACKING = Packing((4, 2, 3, 1, 5))
SAMPLES = ([0, 3], [1, 2, 4])
"""Samples of each rank: unequal in number and in tokens."""
COLUMNS = ("old_log_probs_T", "ref_log_probs_T", "rollout_log_probs_T", "values_T", "new_log_probs_T", "entropy_T")
LOSS = LossConfig(dro_beta=0.1, entropy_coef=0.1, use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="k3")


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: -torch.rand(15, generator=generator) for name in COLUMNS}
    tensors["mask_T"] = (torch.rand(15, generator=generator) > 0.3).int()
    tensors["rewards_B"] = torch.randn(5, generator=generator)
    tensors["logits_TV"] = 3 * torch.randn(15, 12, generator=generator)
    tensors["tokens_T"] = torch.randint(0, 12, (15,), generator=generator)
    tensors["hidden_TD"] = torch.randn(15, 6, generator=generator)
    tensors["weight_VD"] = torch.randn(12, 6, generator=generator)
    return tensors


def train(
    samples: list[int], group: dist.ProcessGroup | None, estimator: str, loss: str, per_token: bool
) -> dict[str, object]:
    """A training step's numbers over some samples, with denominators of all of them."""
    everything = data()
    part = {name: PACKING.take(x, samples) for name, x in everything.items() if name.endswith("_T")}
    packing = PACKING.subset(samples)
    advantages = compute_advantages(
        AdvantageConfig(advantage_estimator=estimator, normalize_advantages=True, kl_coef=0.1),
        AdvantageBatch(
            packing=packing,
            mask_T=part["mask_T"],
            rewards_B=everything["rewards_B"][samples],
            old_log_probs_T=part["old_log_probs_T"],
            ref_log_probs_T=part["ref_log_probs_T"],
            values_T=part["values_T"],
            squared_probs_T=part["entropy_T"].abs(),
            group_ids_B=torch.tensor([0, 1, 0, 0, 1])[samples],
            num_groups=2,
        ),
        group,
    )
    correction = compute_correction(
        MaskedImportanceSampling(tis_level="token" if per_token else "sequence", tis_batch_normalize=True),
        train_log_probs_T=part["old_log_probs_T"],
        rollout_log_probs_T=part["rollout_log_probs_T"],
        mask_T=part["mask_T"],
        packing=packing,
        group=group,
    )
    new_T = part["new_log_probs_T"].requires_grad_()
    output = rl_loss(
        LossConfig(**{**vars(LOSS), "policy_loss": loss, "calculate_per_token_loss": per_token}),
        LossBatch(
            packing=packing,
            mask_T=part["mask_T"],
            advantages_T=advantages.advantages_T,
            train_log_probs_T=part["old_log_probs_T"],
            rollout_log_probs_T=part["rollout_log_probs_T"],
            ref_log_probs_T=part["ref_log_probs_T"],
            correction=correction,
            denominator=float(everything["mask_T"].sum()) if per_token else 5,
        ),
        new_T,
        part["entropy_T"],
    )
    output.loss.backward()
    return {
        "advantages": advantages.advantages_T,
        "weights": correction.weights_T,
        "loss": output.loss.detach(),
        "gradient": new_T.grad,
        "metrics": reduce_metrics([output.metrics], group),
    }


CASES = [
    *itertools.product(("grpo", "reinforce_plus_plus", "ppo", "optimal_token_baseline"), ("ppo_clip",), (False, True)),
    *(("grpo", loss, False) for loss in ("gspo", "dppo_tv", "dppo_kl", "gmpo", "luspo", "sapo", "vespo", "dro")),
]


def score(rank: int, group: dist.ProcessGroup | None, *, forbidden: bool = False) -> dict[str, torch.Tensor]:
    """Log-probs, entropies and gradients with this rank's columns of the vocabulary, or with all of them.

    With `forbidden`, some rows forbid some or all of the tokens of rank 1, as the logits of a padded vocabulary do.
    """
    everything = data()
    if forbidden:
        everything["tokens_T"] %= 6
        everything["logits_TV"][:5, 6:] = -torch.inf
        everything["logits_TV"][5:10, 7:] = -torch.inf
    shard = None if group is None else VocabShard(group)
    columns = slice(None) if group is None else slice(6 * rank, 6 * rank + 6)
    logits_TV = everything["logits_TV"][:, columns].clone().requires_grad_()
    hidden_TD = everything["hidden_TD"].requires_grad_()
    weight_VD = everything["weight_VD"][columns].clone().requires_grad_()
    options = {"temperature": 0.7, "with_entropy": True, "shard": shard, "chunk_rows": 4}
    results: dict[str, torch.Tensor] = {}
    for name, scored in (
        ("logits", token_log_probs(logits_TV, everything["tokens_T"], **options)),
        ("linear", linear_token_log_probs(hidden_TD, weight_VD, everything["tokens_T"], **options)),
    ):
        weights_T = torch.linspace(-1, 2, 15)
        ((weights_T * scored.log_probs_T).sum() + (weights_T.flip(0).cos() * scored.entropy_T).sum()).backward()
        results |= {f"{name}_log_probs": scored.log_probs_T.detach(), f"{name}_entropy": scored.entropy_T.detach()}
    results["squares"] = sum_squared_probs(logits_TV.detach(), temperature=0.7, shard=shard, chunk_rows=4)
    return results | {"grad_logits": logits_TV.grad, "grad_hidden": hidden_TD.grad, "grad_weight": weight_VD.grad}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    results: dict[str, object] = {
        "train": [train(SAMPLES[rank], group, *case) for case in CASES],
        "score": score(rank, group),
        "forbidden": score(rank, group, forbidden=True),
        # Rank 0 has nothing, then nobody has anything.
        "lonely": masked_whiten(torch.tensor([1.0, 3.0][: 2 * rank]), torch.ones(2)[: 2 * rank], group),
        "empty": masked_whiten(torch.ones(1), torch.zeros(1), group),
        "foreign": token_log_probs(torch.zeros(1, 6), torch.tensor([99]), shard=VocabShard(group)).log_probs_T,
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # this file imports from tests/support
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(WORLD)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(pathlib.Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_sharding_over_ranks_changes_nothing(ranks: list[dict], case: int) -> None:
    assert set(SAMPLES[0]) | set(SAMPLES[1]) == set(range(5))
    assert CASES[case][0] in ESTIMATORS
    whole = train(list(range(5)), None, *CASES[case])
    parts = [rank["train"][case] for rank in ranks]
    for name in ("advantages", "weights", "gradient"):
        for samples, part in zip(SAMPLES, parts, strict=True):
            torch.testing.assert_close(part[name], PACKING.take(whole[name], samples), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sum(part["loss"] for part in parts), whole["loss"], atol=1e-6, rtol=1e-6)
    assert parts[0]["metrics"] == parts[1]["metrics"]
    assert parts[0]["metrics"] == pytest.approx(whole["metrics"], abs=1e-6, rel=1e-6)


def test_a_divided_vocabulary_gives_the_same_log_probs_entropies_and_gradients(ranks: list[dict]) -> None:
    whole = score(0, None)
    everything = data()
    exact_T, exact_entropy_T = reference.log_prob_and_entropy(everything["logits_TV"], everything["tokens_T"], 0.7)
    torch.testing.assert_close(whole["logits_log_probs"].double(), exact_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole["logits_entropy"].double(), exact_entropy_T, atol=1e-5, rtol=1e-5)
    for rank, results in enumerate(ranks):
        part = results["score"]
        columns = slice(6 * rank, 6 * rank + 6)
        names = ("logits_log_probs", "logits_entropy", "linear_log_probs", "linear_entropy", "grad_hidden", "squares")
        for name in names:
            torch.testing.assert_close(part[name], whole[name], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(part["grad_logits"], whole["grad_logits"][:, columns], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(part["grad_weight"], whole["grad_weight"][columns], atol=2e-6, rtol=1e-5)


def test_a_rank_all_of_whose_tokens_are_forbidden_changes_nothing(ranks: list[dict]) -> None:
    whole = score(0, None, forbidden=True)
    assert all(whole[name].isfinite().all() for name in ("logits_log_probs", "logits_entropy", "grad_logits"))
    for rank, results in enumerate(ranks):
        part = results["forbidden"]
        for name in ("logits_log_probs", "logits_entropy", "squares"):
            torch.testing.assert_close(part[name], whole[name], atol=2e-6, rtol=1e-5)
        columns = slice(6 * rank, 6 * rank + 6)
        torch.testing.assert_close(part["grad_logits"], whole["grad_logits"][:, columns], atol=2e-6, rtol=1e-5)
    assert ranks[1]["forbidden"]["grad_logits"][:5].abs().max() == 0


def test_a_rank_without_tokens_takes_part_in_whitening(ranks: list[dict]) -> None:
    assert ranks[0]["lonely"].tolist() == []
    torch.testing.assert_close(ranks[1]["lonely"], masked_whiten(torch.tensor([1.0, 3.0]), torch.ones(2)))
    assert [rank["empty"].tolist() for rank in ranks] == [[0.0], [0.0]]


def test_a_token_that_no_rank_has_is_impossible(ranks: list[dict]) -> None:
    assert [rank["foreign"].tolist() for rank in ranks] == [[-torch.inf], [-torch.inf]]


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
