"""MTP layers: their loss is Megatron-Core's own, they learn beside replayed routing, and go on from checkpoints.

Layouts are in `test_megatron_layouts.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import SUPPORT, needs_megatron, run_cases, run_python
from megatron_models import EXPERTS, TOP_K, write_model
from safetensors.torch import load_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), needs_megatron]

FAMILY = "GLM-4.5, MTP"
FAMILIES = {"deepseek": "DeepSeek-V3", "flash": "GLM-4.7-Flash", "mimo": "MiMo"}
"""Others, which slow tests train."""
MOE_LAYERS = 3
COMMON: dict[str, Any] = {"train_backend": "megatron", "adam_eps": 1e-3, "entropy_coef": 0.01, "mtp_num_layers": 1}
LEARNS = {**COMMON, "enable_mtp_training": True}
REPLAY = {"use_rollout_routing_replay": True, "recompute_granularity": "full", "recompute_method": "uniform"}
REPLAY["recompute_num_layers"] = 1
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def case(name: str, model: pathlib.Path, flags: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What `backend_cases` is to run; every step has the same samples."""
    return {"name": name, "model": str(model), "flags": flags, "routing": None, "seed": 0, "save_hf": True, **more}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what one process gave."""
    out = tmp_path_factory.mktemp("mtp")
    write_model(FAMILY, out / "one")
    routing = [EXPERTS, MOE_LAYERS, TOP_K]
    run_cases(
        [
            case("held", out / "one", {**COMMON, **REPLAY}, routing=routing),
            case("learning", out / "one", {**LEARNS, **REPLAY}, routing=routing, save_at=2),
            case("longer", out / "one", {**LEARNS, "adam_eps": 1e-8, "lr": 2e-2}, steps=16),
        ],
        out,
    )
    return out


@pytest.fixture(scope="module")
def more_results(results: pathlib.Path) -> pathlib.Path:
    """The same folder with what slow tests look at besides."""
    write_model(FAMILY, results / "two", num_nextn_predict_layers=2)
    write_model("MiMo", results / "tied", tie_word_embeddings=True)
    for name, family in FAMILIES.items():
        write_model(family, results / f"{name}-model", num_nextn_predict_layers=1)
    two = {**LEARNS, "mtp_num_layers": 2}
    load = {"load": str(results / "learning" / "checkpoints")}
    routing = [EXPERTS, MOE_LAYERS, TOP_K]
    resumed = {**LEARNS, **REPLAY, **load}
    balanced = {**LEARNS, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.01, "moe_router_bias_update_rate": 0.01}
    run_cases(
        [
            case("both", results / "two", two),
            case("tied-one", results / "tied", LEARNS),
            case("balanced", results / "one", balanced),
            *(case(name, results / f"{name}-model", LEARNS) for name in FAMILIES),
            case("resumed", results / "one", resumed, routing=routing),
        ],
        results,
    )
    run_cases(
        [
            case("both-pp2", results / "two", {**two, **PP2}),
            case("both-cp2", results / "two", {**two, "context_parallel_size": 2}),
            case("tied-pp2", results / "tied", {**LEARNS, **PP2}),
            *(case(f"{name}-pp2", results / f"{name}-model", {**LEARNS, **PP2}) for name in FAMILIES),
            case("mimo-sp", results / "mimo-model", {**LEARNS, **TP2}),
            case("resumed-pp2", results / "one", {**resumed, **PP2}, routing=routing),
            case("resumed-sp", results / "one", {**resumed, **TP2}, routing=routing),
        ],
        results,
        ranks=2,
    )
    return results


def metrics(out: pathlib.Path, name: str) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((out / f"{name}.json").read_text())["metrics"]
    return found


def saved(out: pathlib.Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "hf" / "model.safetensors")


def largest_difference(out: pathlib.Path, left: str, right: str) -> float:
    """Of any weight of the Hugging Face folders, MTP layers included."""
    one, other = saved(out, left), saved(out, right)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_loss_acceptance_and_gradients_are_those_of_megatron_core_for_each_sample(tmp_path: pathlib.Path) -> None:
    write_model(FAMILY, tmp_path / "model")
    said = run_python([str(SUPPORT / "mtp_reference.py"), str(tmp_path / "model")]).split("RESULT ")[1]
    found = json.loads(said.splitlines()[0])
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6)
    assert found["acceptance"][0] == found["acceptance"][1] > 0
    assert found["largest"] > 1e-2
    assert found["difference"] < 1e-6


def test_replayed_routing_is_that_of_the_models_own_layers(results: pathlib.Path) -> None:
    held, learning = saved(results, "held"), saved(results, "learning")
    own = [name for name in held if not name.startswith("model.layers.4.")]
    assert all(torch.equal(held[name], learning[name]) for name in own)
    router = "model.layers.4.mlp.gate.weight"
    assert not torch.equal(held[router], learning[router])
    differences = [
        [step["train/routing_difference"] for step in metrics(results, name)] for name in ("held", "learning")
    ]
    assert differences[0] == differences[1]
    assert differences[0][0] > 0.8  # the recorded experts are random


def test_acceptance_rises_while_mtp_layers_are_trained(results: pathlib.Path) -> None:
    steps = metrics(results, "longer")
    acceptance = [step["train/mtp_acceptance"] for step in steps]
    assert acceptance[0] < 0.1
    assert acceptance[-1] > acceptance[0] + 0.3
    assert steps[-1]["train/mtp_loss"] < steps[0]["train/mtp_loss"] - 1
    assert all("train/mtp_acceptance" not in step for step in metrics(results, "held"))


@pytest.mark.slow
def test_several_mtp_layers_learn_and_are_counted_one_by_one(more_results: pathlib.Path) -> None:
    before = load_file(more_results / "two" / "model.safetensors")
    after = saved(more_results, "both")
    for layer in (4, 5):
        name = f"model.layers.{layer}.eh_proj.weight"
        assert not torch.equal(before[name], after[name])
    assert {"train/mtp_acceptance", "train/mtp_acceptance_2"} <= metrics(more_results, "both")[0].keys()
    for name in ("both-pp2", "both-cp2"):
        assert largest_difference(more_results, "both", name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_learn_too(more_results: pathlib.Path, name: str) -> None:
    before, after = load_file(more_results / f"{name}-model" / "model.safetensors"), saved(more_results, name)
    layer = "model.mtp_layers.0." if name == "mimo" else "model.layers.4."
    shared = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")
    # No row is sent to some of the experts.
    own = [each for each in before if each.startswith(layer) and not each.endswith(shared) and ".experts." not in each]
    assert len(own) > 10
    assert not any(torch.equal(before[each], after[each]) for each in own)
    for layout in ("pp2", "sp") if name == "mimo" else ("pp2",):
        assert largest_difference(more_results, name, f"{name}-{layout}") < 1e-5


@pytest.mark.slow
def test_tied_embeddings_are_read_where_the_output_matrix_is(more_results: pathlib.Path) -> None:
    assert largest_difference(more_results, "tied-one", "tied-pp2") < 1e-5


@pytest.mark.slow
def test_routers_of_mtp_layers_are_balanced_like_others(more_results: pathlib.Path) -> None:
    bias = "model.layers.4.mlp.gate.e_score_correction_bias"
    assert not torch.equal(saved(more_results, "held")[bias], saved(more_results, "balanced")[bias])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "resumed-pp2", "resumed-sp"])
def test_mtp_layers_and_their_optimizer_go_on_from_a_checkpoint(more_results: pathlib.Path, name: str) -> None:
    assert largest_difference(more_results, "learning", name) <= (0.0 if name == "resumed" else 1e-5)
