"""The megatron backend computes the same in every layout, and the same as the fsdp backend.

Real megatron-core over gloo: all layouts of a number of ranks are walked in one start. Adam's epsilon is large, so that
rounding of tiny gradients does not become steps of full size.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from megatron_kit import SUPPORT, needs_megatron, run_cases, run_python
from megatron_models import EXPERTS, TOP_K, write_model
from recorded_cases import OFTEN as RECORDED_OFTEN
from recorded_cases import ON_FSDP, assert_recorded, fsdp_case, megatron_cases
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600), needs_megatron]

MODELS = {
    "dense": "Llama",
    "tied": "Llama, tied",
    "moe": "Qwen3-MoE",
    "latent": "DeepSeek-V3",
    "windows": "Gemma 2",
    "local-global": "Gemma 3",
    "all-heads-norms": "MiniMax-M2",
    "predicting": "GLM-4.5, MTP",
    "biases": "Qwen2, Qwen2.5",
    "head-norms": "Qwen3",
    "sigmoid": "GLM-4.5",
    "latent-glm": "GLM-4.7-Flash",
}
SELDOM = {"biases", "head-norms", "sigmoid", "latent-glm"}
"""Models that slow tests alone use."""
HELD = {
    "predicting": {"mtp_num_layers": 1, "entropy_coef": 0.01},
    "learning": {"mtp_num_layers": 1, "entropy_coef": 0.01, "enable_mtp_training": True},
}
"""Layers for multi-token prediction: held as they are, or trained. The entropy has every sample trained on in both."""
MOE_LAYERS = {"moe": 4, "latent": 3, "all-heads-norms": 4, "sigmoid": 3, "latent-glm": 3}
"""Of the models whose routing is replayed."""
TRAINING = {"adam_eps": 1e-3, "weight_decay": 0.1, "lr_warmup_iters": 1}
REPLAY = {
    "use_rollout_routing_replay": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "entropy_coef": 0.01,
    "num_steps_per_rollout": 2,
}
PPO = {
    "advantage_estimator": "ppo",
    "gamma": 0.97,
    "lambd": 0.9,
    "kl_coef": 0.05,
    "critic_lr": 0.02,
    "num_steps_per_rollout": 2,
    "num_critic_only_steps": 1,
    "normalize_advantages": True,
}
OLD = {"keep_old_actor": True, "max_weight_staleness": 2, "use_opd": True, "opd_type": "megatron"}
OTB = {"advantage_estimator": "optimal_token_baseline", "policy_loss_type": "sapo", "num_steps_per_rollout": 2}
SETS = {
    "use_opd": True,
    "opd_type": "megatron",
    "opd_log_prob_top_k": 4,
    "opd_top_k_strategy": "union",
    "rollout_temperature": 0.8,
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "decoder_last_pipeline_num_layers": 1}
VPP = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
DP2 = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "dense-tp2": (2, "dense", TP2),
    "dense-sp": (2, "dense", SP),
    "dense-pp2": (2, "dense", PP2),
    "dense-vpp": (2, "dense", VPP),
    "dense-dp2": (2, "dense", DP2),
    "dense-cp2": (2, "dense", CP2),
    "tied-pp2": (2, "tied", PP2),
    "moe-ep2": (2, "moe", EP2),
    "moe-allgather": (2, "moe", {**SP, "moe_token_dispatcher_type": "allgather"}),
    "replay-sp": (2, "replay", SP),
    "replay-pp2": (2, "replay", PP2),
    "replay-uneven": (2, "replay", UNEVEN),
    "replay-uneven-vpp": (
        2,
        "replay",
        {**PP2, "num_layers_per_virtual_pipeline_stage": 1, "account_for_embedding_in_pipeline_split": True}
        | {"account_for_loss_in_pipeline_split": True, **RECOMPUTE},
    ),
    "replay-spelt-out": (2, "replay", {**PP2, "pipeline_model_parallel_layout": "E|tt|tt|L"}),
    "tied-uneven": (2, "tied", {**PP2, "decoder_first_pipeline_num_layers": 3}),
    "latent-uneven": (2, "latent", {**PP2, "decoder_first_pipeline_num_layers": 1}),
    "predicting-uneven": (2, "predicting", UNEVEN),
    "replay-vpp": (2, "replay", {**VPP, **RECOMPUTE}),
    "replay-ep2": (2, "replay", {**EP2, **RECOMPUTE}),
    "replay-cp2": (2, "replay", CP2),
    "observed-sp": (2, "observed", SP),
    "observed-pp2": (2, "observed", PP2),
    "observed-vpp": (2, "observed", {**VPP, **RECOMPUTE}),
    "observed-cp2": (2, "observed", CP2),
    "latent-pp2": (2, "latent", {**PP2, **RECOMPUTE}),
    "latent-cp2": (2, "latent", CP2),
    "windows-sp": (2, "windows", SP),
    "windows-pp2": (2, "windows", PP2),
    "windows-cp2": (2, "windows", CP2),
    "local-global-sp": (2, "local-global", SP),
    "local-global-pp2": (2, "local-global", PP2),
    "local-global-cp2": (2, "local-global", CP2),
    "latent-ep2": (2, "latent", EP2),
    "all-heads-norms-sp": (2, "all-heads-norms", SP),
    "all-heads-norms-tp4": (4, "all-heads-norms", {**SP, "tensor_model_parallel_size": 4, **DP2, **RECOMPUTE}),
    "all-heads-norms-tp2-ep2": (4, "all-heads-norms", {**SP, **EP2, **DP2}),
    "all-heads-norms-pp2": (2, "all-heads-norms", PP2),
    "biases-sp": (2, "biases", SP),
    "biases-pp2": (2, "biases", PP2),
    "head-norms-sp": (2, "head-norms", SP),
    "head-norms-pp2": (2, "head-norms", PP2),
    "sigmoid-sp": (2, "sigmoid", SP),
    "sigmoid-ep2": (2, "sigmoid", EP2),
    "latent-glm-pp2": (2, "latent-glm", PP2),
    "latent-glm-ep2": (2, "latent-glm", EP2),
    "predicting-sp": (2, "predicting", SP),
    "learning-sp": (2, "learning", SP),
    "learning-dp2": (2, "learning", {}),
    "learning-pp2": (2, "learning", PP2),
    "learning-uneven": (2, "learning", UNEVEN),
    "learning-vpp": (2, "learning", {**VPP, **RECOMPUTE}),
    "learning-cp2": (2, "learning", CP2),
    "learning-ep2": (2, "learning", EP2),
    "learning-padded": (2, "learning", {**SP, "qkv_format": "bshd"}),
    "learning-tp2-pp2": (4, "learning", {**SP, **PP2, **DP2}),
    "learning-pp2-cp2": (4, "learning", {**PP2, **CP2}),
    "learning-overlap": (4, "learning", {**PP2, **DP2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "learning-tp2-ep2": (4, "learning", {**SP, **EP2, **DP2}),
    "predicting-pp2": (2, "predicting", PP2),
    "predicting-ep2": (2, "predicting", {**EP2, **DP2}),
    "ppo-tp2": (2, "ppo", TP2),
    "ppo-sp": (2, "ppo", SP),
    "ppo-vpp": (2, "ppo", VPP),
    "ppo-dp2": (2, "ppo", DP2),
    "ppo-cp2": (2, "ppo", CP2),
    "old-overlap": (2, "old", {**DP2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "old-sp": (2, "old", SP),
    "sets-sp": (2, "sets", SP),
    "sets-pp2": (2, "sets", PP2),
    "sets-cp2": (2, "sets", CP2),
    "old-pp2": (2, "old", PP2),
    "otb-sp": (2, "otb", SP),
    "otb-pp2": (2, "otb", PP2),
    "otb-cp2": (2, "otb", CP2),
    "otb-dp2": (2, "otb", DP2),
    "dense-tp2-pp2": (4, "dense", {**TP2, **PP2}),
    "replay-tp2-pp2": (4, "replay", {**SP, **PP2}),
    "replay-tp2-ep2": (4, "replay", {**SP, **EP2, **DP2}),
    "observed-tp2-pp2": (4, "observed", {**SP, **PP2}),
}
"""Name: ranks, the case of one process that it must equal, and the layout."""
OFTEN = (
    "dense-dp2",
    "tied-pp2",
    "moe-allgather",
    "replay-uneven",
    "replay-vpp",
    "replay-cp2",
    "latent-pp2",
    "local-global-cp2",
    "all-heads-norms-tp2-ep2",
    "learning-tp2-ep2",
    "learning-pp2-cp2",
    "ppo-sp",
    "old-overlap",
    "otb-sp",
    "sets-sp",
)
"""Layouts that every change is tried on: each kind of parallelism and each role at least once. Others are slow."""


def case(name: str, base: str, folder: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """What `backend_cases` is to run; `base` is a model, or what is done with one.

    That is replay or observed (routing of the moe model), ppo (of the tied one), old: old policies and a teacher, otb:
    the optimal token baseline, sets: two teachers, compared with over several tokens (all three of the dense one), or
    learning: layers for multi-token prediction (of the model that has some).
    """
    models = {"replay": "moe", "observed": "moe", "ppo": "tied", "old": "dense", "otb": "dense", "sets": "dense"}
    model = {**models, "learning": "predicting"}.get(base, base)
    replays = base == "replay" or base in MOE_LAYERS.keys() - {"moe"}
    routing = [EXPERTS, MOE_LAYERS[model], TOP_K] if replays else None
    training = {
        "observed": {"observe_rollout_routing": True},
        "otb": OTB,
        "ppo": {**PPO, "critic_load": str(folder / "reward")},
        "old": {**OLD, "opd_teacher_load": str(folder / "teacher")},
        "sets": {**SETS, "opd_teacher_load": [f"odd={folder / 'teacher'}", f"default={folder / 'dense'}"]},
    }.get(base, HELD.get(base, {}))
    settings = {**TRAINING, "train_backend": "megatron", **(REPLAY if replays else training), **flags}
    old = base == "old"
    found = {"name": name, "model": str(folder / model), "flags": settings, "routing": routing, "off_policy": old}
    found["own_routing"] = base == "observed"
    return {**found, "seed": 0, "save_hf": True} if base in HELD else found


def write_reward_model(folder: pathlib.Path) -> None:
    """A value head in the place of the output layer."""
    write_model(MODELS["dense"], folder, seed=2)
    weights = load_file(folder / "model.safetensors")
    hidden = weights.pop("lm_head.weight").shape[1]
    weights["score.weight"] = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) * 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what every case gave."""
    out = tmp_path_factory.mktemp("layouts")
    for name, family in MODELS.items():
        write_model(family, out / name)
    write_model(MODELS["dense"], out / "teacher", seed=1)
    write_reward_model(out / "reward")
    fsdp = {"train_backend": "fsdp"}
    run_cases(
        [
            case("fsdp-dense", "dense", out, **fsdp),
            case("fsdp-tied", "tied", out, **fsdp),
            case("fsdp-moe", "moe", out, **fsdp),
            case("fsdp-replay", "replay", out, **fsdp, share_prompts=False),
            case("fsdp-observed", "observed", out, **fsdp, share_prompts=False),
            case("fsdp-ppo", "ppo", out, **fsdp),
            case("fsdp-old", "old", out, **fsdp),
            case("fsdp-otb", "otb", out, **fsdp),
            case("fsdp-sets", "sets", out, **fsdp),
        ],
        out,
        megatron=False,
    )
    run_cases(
        [*(case(f"fsdp-{base}-dp2", base, out, **fsdp) for base in ("ppo", "old", "otb", "sets")), fsdp_case(out)],
        out,
        ranks=2,
        megatron=False,
    )
    alone = [
        case(name, name, out)
        for name in [*(MODELS.keys() - SELDOM), "replay", "observed", "learning", "ppo", "old", "otb", "sets"]
    ]
    for base in ("ppo", "old"):
        alone.append({**case(f"{base}-saved", base, out, **DP2), "save_at": 2})
        alone.append(case(f"{base}-resumed", base, out, **DP2, load=str(out / f"{base}-saved" / "checkpoints")))
    moving = {"use_kl_loss": True, "kl_loss_coef": 0.1, "ref_update_interval": 2}
    moved = {**case("moved", "dense", out, **moving), "save_at": 3, "steps": 4}
    removed = {**case("moved-resumed", "dense", out, **moving, load=str(out / "moved" / "checkpoints")), "steps": 4}
    replayed = case("recomputed", "replay", out, **RECOMPUTE)
    kept = [each for kind in OPTIMIZERS for each in kept_cases(kind, out)]
    for kind, source in OTHER_TYPES.items():
        load = str(out / f"saved-{source}" / "checkpoints")
        loaded = case(f"{kind}-of-{source}", "moe", out, **OPTIMIZERS[kind], load=load)
        kept += [loaded, {**loaded, "name": f"{kind}-of-{source}-loaded", "steps": 2}]
    run_cases([*alone, replayed, *kept, *begun_cases(BEGUN_OFTEN, out), moved, removed], out)
    run_layouts(out, OFTEN, RESUMED_OFTEN, megatron_cases(out, RECORDED_OFTEN))
    return out


@pytest.fixture(scope="module")
def more_results(results: pathlib.Path) -> pathlib.Path:
    """The same folder with what slow tests look at besides."""
    begun = [case(name, name, results) for name in SELDOM]
    for name in BEGUN.keys() - {BEGUN_OFTEN}:
        begun += begun_cases(name, results)
    for kind, source in EXCHANGED.items():
        load = str(results / f"saved-{source}" / "checkpoints")
        begun.append(case(f"exchanged-{kind}", "moe", results, **OPTIMIZERS[kind], load=load))
    run_cases(begun, results)
    run_layouts(results, LAYOUTS.keys() - set(OFTEN), RESUMED.keys() - set(RESUMED_OFTEN))
    return results


def kept_cases(kind: str, out: pathlib.Path) -> list[dict[str, Any]]:
    """A run that saves after two of three steps, and one that takes the third from there."""
    flags = OPTIMIZERS[kind]
    saved = {**case(f"saved-{kind}", "moe", out, **flags), "save_at": 2, "save_hf": kind == "distributed"}
    short = {**case(f"two-steps-{kind}", "moe", out, **flags), "steps": 2}
    resumed = case(f"resumed-{kind}", "moe", out, **flags, load=str(out / f"saved-{kind}" / "checkpoints"))
    return [saved, short, resumed]


def begun_cases(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
    """A run that trains on while it saves after two of three steps, and one that takes the third from there."""
    kind = BEGUN[name]
    saved = {**case(name, "moe", out, **OPTIMIZERS[kind]), "save_at": 2, "save_in_background": True}
    return [saved, case(f"taken-up-{kind}", "moe", out, **OPTIMIZERS[kind], load=str(out / name / "checkpoints"))]


def run_layouts(
    out: pathlib.Path, names: Collection[str], resumed: Iterable[str], more: Sequence[dict[str, Any]] = ()
) -> None:
    """Train in these layouts, go on in those from a checkpoint of one process, and run more cases of two ranks."""
    for ranks in (2, 4):
        cases = [
            case(name, base, out, **flags) for name, (n, base, flags) in LAYOUTS.items() if n == ranks and name in names
        ]
        for name in resumed if ranks == 2 else ():
            kind, layout = RESUMED[name]
            load = str(out / f"saved-{kind}" / "checkpoints")
            cases.append(case(f"resumed-{name}", "moe", out, **{**OPTIMIZERS[kind], **layout}, load=load))
        run_cases([*cases, *(more if ranks == 2 else ())], out, ranks=ranks)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distributed": DP2,
    "16-bit": {"train_dtype": "bfloat16"},
    "16-bit-distributed": {"train_dtype": "bfloat16", **DP2},
}
"""Each keeps its state in its own way."""
EXCHANGED = {
    "plain": "distributed",
    "distributed": "plain",
    "16-bit": "16-bit-distributed",
    "16-bit-distributed": "16-bit",
}
"""Kind of optimizer that goes on with the state of another."""
OTHER_TYPES = {"plain": "16-bit-distributed", "16-bit": "plain"}
"""Kind of optimizer that goes on with the state of a run in another number type."""
RESUMED = {
    f"{kind}-{name}": (kind, layout)
    for kind in ("plain", "distributed")
    for name, layout in {"dp2": {}, "sp": SP, "pp2": PP2, "uneven": UNEVEN, "ep2": EP2}.items()
}

RESUMED_OFTEN = ("distributed-sp",)
BEGUN = {f"begun-{kind}": kind for kind in OPTIMIZERS}
BEGUN_OFTEN = "begun-distributed"


def often_or_slow(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; of those that are not tried on every change, slow ones."""
    return [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in names]


def is_slow(name: str) -> bool:
    """Whether `more_results` has it."""
    slow = (LAYOUTS.keys() - set(OFTEN)) | (RESUMED.keys() - set(RESUMED_OFTEN)) | (BEGUN.keys() - {BEGUN_OFTEN})
    return name in slow


@pytest.fixture
def spread(request: pytest.FixtureRequest, results: pathlib.Path, name: str) -> pathlib.Path:
    """The folder with what the case `name` gave."""
    folder: pathlib.Path = request.getfixturevalue("more_results") if is_slow(name) else results
    return folder


def worst_differences(out: pathlib.Path, left: str, right: str) -> tuple[float, float]:
    """Largest difference of a metric of any step, relative above 1, and of a weight."""
    records = [json.loads((out / f"{name}.json").read_text())["metrics"] for name in (left, right)]
    metrics = [
        abs(a[key] - b[key]) / max(1.0, abs(a[key]))
        for a, b in zip(records[0][-len(records[1]) :], records[1], strict=True)
        for key in a.keys() - {"perf/log_probs_time"}
        if key in b
    ]
    weights = [load_file(out / f"{name}.safetensors") for name in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    return max(metrics), max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


@pytest.mark.parametrize("base", ["dense", "tied", "moe", "replay", "observed", "ppo", "old", "otb", "sets"])
def test_one_process_trains_as_the_fsdp_backend_does(results: pathlib.Path, base: str) -> None:
    metrics, weights = worst_differences(results, f"fsdp-{base}", base)
    assert metrics < 1e-4
    assert weights < 1e-4


@pytest.mark.parametrize("name", often_or_slow(LAYOUTS))
def test_a_layout_trains_as_one_process_does(spread: pathlib.Path, name: str) -> None:
    metrics, weights = worst_differences(spread, LAYOUTS[name][1], name)
    assert metrics < 1e-5
    assert weights < 1e-5


@pytest.mark.parametrize("name", often_or_slow(LAYOUTS))
def test_only_parameters_that_changed_on_some_rank_are_gathered_again(spread: pathlib.Path, name: str) -> None:
    said = json.loads((spread / f"{name}.json").read_text())
    first, one, none = said["gathered"]
    assert first == said["total"]
    assert 0 < one < 0.6 * first
    assert none == 0


@pytest.mark.parametrize("name", [ON_FSDP, *RECORDED_OFTEN])
def test_ranks_record_for_drafts_what_the_stock_model_computes(results: pathlib.Path, name: str) -> None:
    assert_recorded(results, name)


def test_recomputation_replays_the_same_routing(results: pathlib.Path) -> None:
    assert worst_differences(results, "replay", "recomputed") == (0.0, 0.0)


def test_replay_sends_tokens_elsewhere_and_trains_the_router(results: pathlib.Path) -> None:
    steps = json.loads((results / "replay.json").read_text())["metrics"]
    assert all(step["train/routing_difference"] > 0.8 for step in steps)  # the recorded experts are random
    before = load_file(results / "moe" / "model.safetensors")
    after = load_file(results / "replay.safetensors")
    routers = [name for name in after if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in routers)


def test_the_share_of_tokens_that_go_elsewhere_than_in_the_engine_is_counted(results: pathlib.Path) -> None:
    observed = json.loads((results / "observed.json").read_text())["metrics"]
    assert abs(observed[0]["train/tokens_routed_differently"] - 0.2) < 0.01  # every fifth token's routing was changed
    assert all(step["train/tokens_routed_differently"] > 0.2 for step in observed[1:])  # with weights of later steps
    replayed = json.loads((results / "replay-vpp.json").read_text())["metrics"]
    assert [step["train/tokens_routed_differently"] for step in replayed] == [0.0] * len(replayed)


def test_observing_routing_changes_nothing(results: pathlib.Path) -> None:
    assert worst_differences(results, "moe", "observed") == (0.0, 0.0)


@pytest.mark.parametrize("name", ["dense", "moe", "tied-pp2", "learning-tp2-ep2"])
def test_the_layout_announces_what_is_exported(results: pathlib.Path, name: str) -> None:
    announced = json.loads((results / f"{name}.json").read_text())["layout"]
    weights = load_file(results / f"{name}.safetensors")
    assert sorted(announced) == sorted([n, str(t.dtype), list(t.shape)] for n, t in weights.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(results: pathlib.Path, kind: str) -> None:
    assert worst_differences(results, f"saved-{kind}", f"resumed-{kind}") == (0.0, 0.0)


@pytest.mark.parametrize("name", often_or_slow(BEGUN))
def test_a_checkpoint_written_while_training_goes_on_has_the_state_of_before(spread: pathlib.Path, name: str) -> None:
    assert worst_differences(spread, f"saved-{BEGUN[name]}", f"taken-up-{BEGUN[name]}") == (0.0, 0.0)
    assert worst_differences(spread, f"saved-{BEGUN[name]}", name) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXCHANGED)
def test_another_kind_of_optimizer_goes_on_with_the_state(more_results: pathlib.Path, kind: str) -> None:
    assert worst_differences(more_results, f"saved-{kind}", f"exchanged-{kind}") == (0.0, 0.0)


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_run_goes_on_in_another_number_type(results: pathlib.Path, kind: str) -> None:
    source = OTHER_TYPES[kind]
    before, after = (
        load_file(results / f"{name}.safetensors") for name in (f"two-steps-{source}", f"{kind}-of-{source}-loaded")
    )
    # Rounded alike they are equal; the one in float32 has more digits, also where they were of a 16-bit run.
    assert all(torch.equal(before[name].bfloat16(), after[name].bfloat16()) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    step = json.loads((results / f"{kind}-of-{source}.json").read_text())["metrics"][-1]
    whole = json.loads((results / f"saved-{source}.json").read_text())["metrics"][-1]
    assert step["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=0.05)


@pytest.mark.parametrize("base", ["ppo", "old", "otb", "sets"])
def test_two_replicas_of_the_fsdp_backend_train_as_one_does(results: pathlib.Path, base: str) -> None:
    metrics, weights = worst_differences(results, f"fsdp-{base}", f"fsdp-{base}-dp2")
    assert metrics < 1e-5
    assert weights < 1e-5


def test_a_critic_is_resumed_bit_for_bit(results: pathlib.Path) -> None:
    steps = json.loads((results / "ppo.json").read_text())["metrics"]
    assert "train/pg_loss" not in steps[0]  # warm-up
    assert all(step["train/value_loss"] > 0.01 for step in steps)
    assert worst_differences(results, "ppo-saved", "ppo-resumed") == (0.0, 0.0)


def test_old_policies_are_resumed_bit_for_bit(results: pathlib.Path) -> None:
    steps = json.loads((results / "old.json").read_text())["metrics"]
    assert all(0.2 < step["train/old_actor_ratio"] < 0.6 for step in steps[1:])
    assert all(abs(step["train/opd_reverse_kl"]) > 0.01 for step in steps)
    assert worst_differences(results, "old-saved", "old-resumed") == (0.0, 0.0)


def test_a_reference_that_moves_is_resumed_as_it_was(results: pathlib.Path) -> None:
    last = json.loads((results / "moved-resumed.json").read_text())["metrics"][-1]
    assert last["train/kl_loss"] != 0
    assert worst_differences(results, "moved", "moved-resumed") == (0.0, 0.0)


@pytest.mark.parametrize("name", often_or_slow(RESUMED))
def test_a_checkpoint_goes_on_in_another_layout(spread: pathlib.Path, name: str) -> None:
    metrics, weights = worst_differences(spread, f"saved-{RESUMED[name][0]}", f"resumed-{name}")
    assert metrics < 1e-5
    assert weights < 1e-5


@pytest.mark.slow
def test_parts_of_layers_are_recomputed_to_the_same(more_results: pathlib.Path) -> None:
    parts = {
        "replay": ["core_attn", "moe", "layernorm"],
        "dense": ["core_attn", "mlp"],
        "latent": ["moe", "mla_up_proj"],
    }
    cases = [
        case(f"parts-{base}", base, more_results, recompute_granularity="selective", recompute_modules=names)
        for base, names in parts.items()
    ]
    run_cases(cases, more_results)
    for base in parts:
        assert worst_differences(more_results, base, f"parts-{base}") == (0.0, 0.0)


@pytest.mark.slow
def test_layers_are_split_over_stages_as_megatron_splits_them() -> None:
    said = run_python([str(SUPPORT / "megatron_splits.py")]).split()
    assert said[-2] == "compared"
    assert int(said[-1]) > 200


def mtp_layers(file: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(file).items() if name.startswith("model.layers.4.")}


def test_layers_for_multi_token_prediction_learn_and_leave_the_rest_alone(results: pathlib.Path) -> None:
    losses = [step["train/mtp_loss"] for step in json.loads((results / "learning.json").read_text())["metrics"]]
    assert losses == sorted(losses, reverse=True)
    without, rest = (load_file(results / f"{name}.safetensors") for name in ("predicting", "learning"))
    assert all(torch.equal(without[name], rest[name]) for name in without)
    untrained = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")
    before = mtp_layers(results / "predicting" / "model.safetensors")
    after = mtp_layers(results / "learning" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if not name.endswith(untrained))


@pytest.mark.parametrize("name", often_or_slow(["predicting", "predicting-pp2", "predicting-ep2"]))
def test_layers_for_multi_token_prediction_that_are_not_trained_stay_as_they_are(
    spread: pathlib.Path, name: str
) -> None:
    before = mtp_layers(spread / "predicting" / "model.safetensors")
    after = mtp_layers(spread / name / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(shared))


@pytest.mark.parametrize("name", often_or_slow([name for name in LAYOUTS if name.startswith("learning")]))
def test_layers_for_multi_token_prediction_learn_the_same_in_every_layout(spread: pathlib.Path, name: str) -> None:
    one, several = (mtp_layers(spread / part / "hf" / "model.safetensors") for part in ("learning", name))
    assert max(float((one[name] - several[name]).abs().max()) for name in one) < 1e-5


def test_the_hugging_face_folder_has_the_names_and_values_of_the_files(results: pathlib.Path) -> None:
    source, written = (load_file(results / part / "model.safetensors") for part in ("moe", "saved-distributed/hf"))
    assert source.keys() == written.keys()
    assert all(source[name].shape == written[name].shape for name in source)
    fused = load_file(results / "saved-distributed.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    expert = [written[f"model.layers.1.mlp.experts.5.{part}_proj.weight"] for part in ("gate", "up")]
    torch.testing.assert_close(fused[5], torch.cat(expert), rtol=0, atol=0)
    assert (results / "saved-distributed/hf/tokenizer.json").is_file()
