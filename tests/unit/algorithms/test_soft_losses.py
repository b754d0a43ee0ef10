import math

import pytest
import torch
from policy_loss_cases import MASK, SAMPLES, gradient, gradients_are_those_of_the_loss, terms

from miles.algorithms import PolicyLossConfig

OLD = [-1.0, -2.0, -0.5, -1.5, 0.0, -0.7]
STEP = [0.6, -0.2, 0.1, -0.9, 0.0, 0.3]
NEW = [o + s for o, s in zip(OLD, STEP, strict=True)]
ADVANTAGES = [2.0, 1.0, 2.0, -1.0, 0.0, -3.0]


def kept(values: list[float]) -> list[float]:
    return [v if m else 0.0 for v, m in zip(values, MASK, strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sapos_gate_by_the_papers_formula() -> None:
    config = PolicyLossConfig(sapo_tau_pos=1.5, sapo_tau_neg=4.0)
    result = terms("sapo", NEW, OLD, ADVANTAGES, config)
    taus = [1.5 if a > 0 else 4.0 for a in ADVANTAGES]
    gates = [4 / tau * sigmoid(tau * (math.exp(s) - 1)) for tau, s in zip(taus, STEP, strict=True)]
    assert result.loss_T.tolist() == pytest.approx(kept([-g * a for g, a in zip(gates, ADVANTAGES, strict=True)]))


def test_sapo_weighs_a_token_by_four_p_one_minus_p_and_its_ratio() -> None:
    config = PolicyLossConfig()
    taus = [1.0 if a > 0 else 1.05 for a in ADVANTAGES]
    opens = [sigmoid(tau * (math.exp(s) - 1)) for tau, s in zip(taus, STEP, strict=True)]
    weights = [4 * p * (1 - p) for p in opens]
    expected = [-w * math.exp(s) * a for w, s, a in zip(weights, STEP, ADVANTAGES, strict=True)]
    assert gradient("sapo", NEW, OLD, ADVANTAGES, config) == pytest.approx(kept(expected))
    reported = terms("sapo", NEW, OLD, ADVANTAGES, config).metrics_T["sapo_weight"].tolist()
    assert kept(reported) == pytest.approx(kept(weights))


def test_vespo_weighs_a_sequence_by_its_whole_ratio() -> None:
    config = PolicyLossConfig()
    ws = [math.exp(sum(STEP[t] for t in sample)) for sample in SAMPLES]
    assert ws == pytest.approx([math.exp(0.5), math.exp(-0.6)])

    def phi(w: float, gains: bool) -> float:
        k, decay = (2.0, 3.0) if gains else (3.0, 2.0)
        return w**k * math.exp(decay * (1 - w))

    weights = [phi(ws[0 if t < 3 else 1], a >= 0) for t, a in enumerate(ADVANTAGES)]
    result = terms("vespo", NEW, OLD, ADVANTAGES, config)
    losses = [-w * a * n for w, a, n in zip(weights, ADVANTAGES, NEW, strict=True)]
    assert result.loss_T.tolist() == pytest.approx(kept(losses))
    assert kept(result.metrics_T["vespo_weight"].tolist()) == pytest.approx(kept(weights))
    # The weight has no gradient of its own.
    expected = [-w * a for w, a in zip(weights, ADVANTAGES, strict=True)]
    assert gradient("vespo", NEW, OLD, ADVANTAGES, config) == pytest.approx(kept(expected))


@pytest.mark.parametrize("step", [-1e4, -30.0, 30.0, 500.0])
def test_vespo_lets_sequences_far_away_go(step: float) -> None:
    moved = [o + step for o in OLD]
    for advantage in (1.0, -1.0):
        found = gradient("vespo", moved, OLD, [advantage] * 6, PolicyLossConfig())
        assert found == pytest.approx([0.0] * 6, abs=1e-12)


def test_dro_by_hand() -> None:
    config = PolicyLossConfig(dro_beta=0.4)
    result = terms("dro", NEW, OLD, ADVANTAGES, config)
    losses = [-(n * a - 0.2 * s * s) for n, a, s in zip(NEW, ADVANTAGES, STEP, strict=True)]
    assert result.loss_T.tolist() == pytest.approx(kept(losses))
    expected = [-(a - 0.4 * s) for a, s in zip(ADVANTAGES, STEP, strict=True)]
    assert gradient("dro", NEW, OLD, ADVANTAGES, config) == pytest.approx(kept(expected))
    assert gradients_are_those_of_the_loss("dro", OLD, ADVANTAGES, config, STEP)


def test_dros_gradient_is_that_of_the_papers_regression() -> None:
    # For responses of one token: 1/2 (r - V - tau log(p / q))^2 is minimised with tau times the gradient.
    tau = 0.7
    new_T = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    errors_T = torch.tensor(ADVANTAGES) - tau * (new_T - torch.tensor(OLD, dtype=torch.float64))
    (errors_T.square() / 2 * torch.tensor(MASK)).sum().backward()
    assert new_T.grad is not None
    found = gradient("dro", NEW, OLD, ADVANTAGES, PolicyLossConfig(dro_beta=tau))
    assert [tau * g for g in found] == pytest.approx(new_T.grad.tolist())


def test_dro_needs_its_weight() -> None:
    with pytest.raises(ValueError, match="needs dro_beta"):
        terms("dro", NEW, OLD, ADVANTAGES, PolicyLossConfig())


def test_gradients_match_finite_differences_where_the_weight_is_not_cut_off() -> None:
    assert gradients_are_those_of_the_loss("sapo", OLD, ADVANTAGES, PolicyLossConfig(), STEP)


@pytest.mark.parametrize("name", ["sapo", "vespo", "dro"])
def test_the_gradient_on_policy_is_the_policy_gradient(name: str) -> None:
    found = gradient(name, OLD, OLD, ADVANTAGES, PolicyLossConfig(dro_beta=0.3))
    assert found == pytest.approx(kept([-a for a in ADVANTAGES]))
