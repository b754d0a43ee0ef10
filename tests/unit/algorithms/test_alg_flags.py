import types

from miles.algorithms import IcePop, TruncatedImportanceSampling, advantage_config, loss_config


def test_options_are_read_from_attributes_named_like_the_flags() -> None:
    flags = types.SimpleNamespace(
        advantage_estimator="gspo", eps_clip=0.01, gamma=0.9, use_tis=True, tis_clip=3.0, lr=1.0
    )
    assert advantage_config(flags).gamma == 0.9
    losses = loss_config(flags)
    assert (losses.policy_loss, losses.eps_clip) == ("gspo", 0.01)
    assert losses.correction == TruncatedImportanceSampling(tis_clip=3.0)


def test_overrides_and_another_correction_win() -> None:
    flags = types.SimpleNamespace(advantage_estimator="dr_grpo", use_tis=True)
    losses = loss_config(flags, correction=IcePop(), loss_length=100, entropy_coef=0.5)
    assert losses.correction == IcePop()
    assert (losses.loss_length, losses.entropy_coef) == (100, 0.5)
