"""Which matrices a format covers: the same in both forms of a model's names, whatever they are called in its family."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from megatron_models import FAMILIES, architecture, config_of

from miles.config.sections.precision import PrecisionConfig
from miles.precision.layers import QuantisedLayers
from miles.weights.naming.model_tensors import ModelTensors, read_model_tensors

RECIPES = {
    "every matrix": QuantisedLayers(),
    "routed experts": QuantisedLayers(only=(".experts.",)),
    "but down projections": QuantisedLayers(but=("down_proj",)),
    "but what MiniMax calls so": QuantisedLayers(but=(".w2",)),
    "but attention": QuantisedLayers(but=("self_attn",)),
    "without the first layers": QuantisedLayers(high_layers=frozenset({0, 1})),
    "ignored as MiniMax has it": QuantisedLayers(ignored=("gate", "lm_head", "model.layers.1.block_sparse_moe")),
    "ignored as others have it": QuantisedLayers(ignored=("model.layers.1.mlp", r"re:.*layers\.2\.mlp\.experts.*")),
    "every expert of a layer": QuantisedLayers(
        ignored=tuple(
            f"model.layers.1.mlp.experts.{expert}.{matrix}"
            for expert in range(8)
            for matrix in ("gate_proj", "up_proj", "down_proj")
        )
    ),
}
HIGH_PRECISION = (
    *("embed_tokens", "embed_tokens_per_layer", "lm_head", "eh_proj", "input_proj", "weights_proj", "gate", "router"),
)
SMALL = ("shared_expert_gate", "modality_router", "correction_coefs", "prediction_coefs")


@pytest.fixture(scope="module")
def tensors_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelTensors]:
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def read(family: str) -> ModelTensors:
        config = config_of(family)
        config.architectures = [architecture(family)]
        config.save_pretrained(root / family)
        return read_model_tensors(root / family)

    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_covered_as_each_of_its_tensors_in_a_checkpoint(
    family: str, tensors_of: Callable[[str], ModelTensors]
) -> None:
    tensors = tensors_of(family)
    different = set()
    for name, shape in tensors.module.items():
        checkpoint = tensors.conversion.checkpoint_shapes({name: shape})
        different |= {name} - set(checkpoint)
        for recipe, layers in RECIPES.items():
            answers = {layers.cover(part, len(size)) for part, size in checkpoint.items()}
            assert answers == {layers.cover(name, len(shape))}, (recipe, name)
    assert bool(different) == (".experts.0." in " ".join(tensors.conversion.checkpoint_shapes(tensors.module)))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_heads_routers_and_vectors_are_never_covered(
    family: str, tensors_of: Callable[[str], ModelTensors]
) -> None:
    tensors = tensors_of(family)
    shapes = {**tensors.module, **tensors.mtp}
    covered = {name for name, shape in shapes.items() if QuantisedLayers().cover(name, len(shape))}
    assert not [name for name in covered if len(shapes[name]) < 2]
    kept = {name.split(".")[-2] for name in shapes.keys() - covered if len(shapes[name]) >= 2}
    assert "embed_tokens" in kept
    assert kept <= {*HIGH_PRECISION, *SMALL}


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_covers_all_routed_experts_and_no_shared_ones(
    family: str, tensors_of: Callable[[str], ModelTensors]
) -> None:
    tensors = tensors_of(family)
    layers = QuantisedLayers(only=PrecisionConfig().int4_layers)
    covered = {name for name, shape in tensors.module.items() if layers.cover(name, len(shape))}
    assert covered == {name for name in tensors.module if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    mtp = {name for name, shape in tensors.mtp.items() if layers.cover(name, len(shape))}
    assert mtp == {name for name in tensors.mtp if ".experts." in name}


@pytest.mark.parametrize(
    "layers",
    [
        QuantisedLayers(but=("gate_proj",)),
        QuantisedLayers(only=(".up_proj",)),
        QuantisedLayers(but=(".w1",)),
        QuantisedLayers(but=("experts.5.",)),
        QuantisedLayers(ignored=("model.layers.0.mlp.experts.3.up_proj",)),
        QuantisedLayers(ignored=("model.layers.0.block_sparse_moe.experts.3.w3",)),
        QuantisedLayers(ignored=(r"re:.*experts\.3\..*",)),
        QuantisedLayers(but=(".1.up_proj",)),
        QuantisedLayers(but=("experts.0.",)),
        QuantisedLayers(only=(".7.",)),
        QuantisedLayers(ignored=(r"re:.*experts\.[1-3]\..*",)),
        QuantisedLayers(ignored=(r"re:.*experts\.(?:4|12)\..*",)),
    ],
)
def test_a_pattern_that_names_some_of_the_matrices_in_a_tensor_is_refused(layers: QuantisedLayers) -> None:
    with pytest.raises(ValueError, match=r"which is quantised, and .* which is not; have int4_layers, extra_"):
        layers.cover("model.layers.0.mlp.experts.gate_up_proj", 3)


@pytest.mark.parametrize(
    "layers",
    [
        QuantisedLayers(ignored=(r"re:.*experts\.[^01]\..*",)),
        QuantisedLayers(ignored=(r"re:.*\.[4-6]\d\.down_proj",)),
        QuantisedLayers(ignored=("model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1")),
        QuantisedLayers(but=("00.down_proj",)),
    ],
)
def test_all_experts_are_asked_where_it_is_known_how_many_there_are(layers: QuantisedLayers) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    layers.cover(name, 3)
    with pytest.raises(ValueError, match=r"which is quantised, and .* which is not"):
        layers.cover_experts(name, 128)


def test_rules_may_name_every_expert() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    every = QuantisedLayers(ignored=(r"re:.*layers\.0\.mlp\.experts\.[0-7]\..*", "re:.*self_attn.*"))
    assert not every.cover(name, 3)
    assert not every.cover_experts(name, 8)
    assert every.cover_experts(name.replace("0", "1"), 8)
    names = tuple(f"model.layers.61.block_sparse_moe.experts.{e}.{w}" for e in "01" for w in ("w1", "w2", "w3"))
    pair = QuantisedLayers(ignored=names)
    assert not pair.cover(name.replace("0", "61"), 3)
    assert pair.cover_experts(name, 2)


@pytest.mark.parametrize(
    ("entry", "asked"),
    [
        ("re:.*self_attn.*", {3, 60}),
        (r"re:.*experts\.[1-3]\..*", {3, 60}),
        (r"re:.*layers\.(?:7|20)\.mlp.*", {3, 7, 20, 60}),
        (r"re:.*layers\.[1-3]\.mlp\.experts.*", set(range(3, 61))),
        (r"re:.*\.7\.mlp\.experts.*", set(range(3, 61))),
        ("model.layers.7.mlp.experts.5", {3, 7, 60}),
        ("model.layers.7.mlp.gate", set()),
        ("lm_head", set()),
    ],
)
def test_layers_in_which_other_experts_may_be_named_are_asked(entry: str, asked: set[int]) -> None:
    assert QuantisedLayers(ignored=(entry,)).layers_to_ask(range(3, 61)) == asked


def test_layers_are_asked_that_are_not_left_out_as_a_whole() -> None:
    layers = QuantisedLayers(ignored=("model.layers.4", "re:.*experts.*"), high_layers=frozenset({3, 60}))
    assert layers.layers_to_ask(range(3, 61)) == {4, 5, 59}


def test_down_projections_can_be_kept_without_gates_and_ups() -> None:
    layers = QuantisedLayers(but=("down_proj",))
    assert layers.cover("model.layers.0.mlp.experts.gate_up_proj", 3)
    assert not layers.cover("model.layers.0.mlp.experts.down_proj", 3)


def test_layers_of_multi_token_prediction_have_numbers_of_their_own() -> None:
    layers = QuantisedLayers(high_layers=frozenset({0, 3}))
    assert not layers.cover("model.layers.3.self_attn.o_proj.weight", 2)
    assert layers.cover("model.layers.4.self_attn.o_proj.weight", 2)
    assert layers.cover("model.layers.13.self_attn.o_proj.weight", 2)
