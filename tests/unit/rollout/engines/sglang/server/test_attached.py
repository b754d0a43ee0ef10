"""Servers that run already are taken only if they hold weights as versions come."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import pytest
from aiohttp import web
from torch_engine_models import save_checkpoint

from miles.precision.layers import QuantisedLayers
from miles.precision.quantization_config import quantization_config
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.sglang import SglangEngine, SglangOptions
from miles.services.rollout.engines.sglang.errors import ServerUnstartable
from miles.services.rollout.engines.sglang.server.attached import why_unfit
from miles.services.rollout.engines.sglang.server.served_model import served_quantisation

SHAPES = {
    "model.embed_tokens.weight": (320, 256),
    **{
        f"model.layers.{layer}.{name}.weight": (256, 256)
        for layer in range(2)
        for name in ("self_attn.o_proj", "mlp.gate", *(f"mlp.experts.{expert}.up_proj" for expert in range(2)))
    },
}
FP8 = Recipe(format="fp8_block", layers=QuantisedLayers(but=("o_proj",)))
INT4 = Recipe(format="int4", layers=QuantisedLayers(only=(".experts.",)), group_size=64)
FP8_FOLDER, INT4_FOLDER = served_quantisation(FP8, SHAPES), served_quantisation(INT4, SHAPES)


@pytest.mark.parametrize(
    ("recipe", "quantised", "said", "why"),
    [
        (None, None, {}, None),
        (None, None, {"quantization": "unquant"}, None),
        (FP8, FP8_FOLDER, {}, None),
        (FP8, FP8_FOLDER, {"quantization": "fp8"}, None),
        (INT4, INT4_FOLDER, {"quantization": "compressed-tensors"}, None),
        (INT4, None, {"json_model_override_args": json.dumps({"quantization_config": INT4_FOLDER})}, None),
        (None, None, {"quantization": "fp8"}, "runs with quantization = fp8, and versions come in bfloat16"),
        (FP8, None, {"quantization": "fp8"}, "hold weights in bfloat16, and versions come in fp8_block"),
        (FP8, FP8_FOLDER, {"quantization": "w8a8_fp8"}, "runs with quantization = w8a8_fp8, and versions come in fp8"),
        (INT4, FP8_FOLDER, {}, "hold weights in fp8_block, and versions come in int4"),
        (None, FP8_FOLDER, {}, "hold weights in fp8_block, and versions come in bfloat16"),
        (
            INT4,
            served_quantisation(Recipe(format="int4", layers=INT4.layers, group_size=32), SHAPES),
            {},
            "in groups of 32, and versions come in groups of 64",
        ),
        (FP8, quantization_config(FP8, ()), {}, "layers.0.self_attn.o_proj.weight in fp8_block, and versions do not"),
        (
            FP8,
            quantization_config(FP8, ["o_proj", "model.layers.1.mlp.experts"]),
            {},
            "model.layers.1.mlp.experts.0.up_proj.weight not in fp8_block, and versions do",
        ),
        (None, {"quant_method": "awq"}, {}, "quantised by awq, which is not known here, and versions come in bfloat16"),
        (FP8, {"quant_method": "fp8"}, {}, "FP8 weights have blocks of no size, not of "),
    ],
)
def test_a_server_that_holds_weights_otherwise_is_told_from_others(
    tmp_path: pathlib.Path, recipe: Recipe | None, quantised: dict[str, Any] | None, said: dict[str, Any], why: str
) -> None:
    stated = {} if quantised is None else {"quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **stated}))
    found = why_unfit({"model_path": str(tmp_path), **said}, recipe, "bfloat16", SHAPES)
    assert found is None if why is None else why in str(found), found


def test_of_a_folder_on_another_host_the_servers_own_word_counts() -> None:
    there = {"model_path": "/not/here"}
    assert why_unfit(there, FP8, "bfloat16", SHAPES) is None
    assert why_unfit({**there, "quantization": "awq"}, FP8, "bfloat16", SHAPES) is not None


async def test_an_engine_does_not_start_with_a_server_that_quantises_by_itself(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path, "qwen3")

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "model_path": str(tmp_path), "quantization": "fp8"})

    app = web.Application()
    app.router.add_get("/server_info", info)
    app.router.add_get("/model_info", info)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    options = SglangOptions(hf_checkpoint=str(tmp_path), device="cpu", dtype="float32", addresses=(f"{host}:{port}",))
    try:
        with pytest.raises(ServerUnstartable, match="runs with quantization = fp8, and versions come in float32"):
            async with asyncio.timeout(60):
                await SglangEngine(options).start()
    finally:
        await runner.cleanup()
