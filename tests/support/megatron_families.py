"""Converts a tiny model of each family to Megatron-Core and back, and prints the results as JSON lines."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from trainer_cases import VOCAB, job_config

from miles.services.trainer.backends.megatron.export import Exporter
from miles.services.trainer.backends.megatron.model.build_model import MegatronModel, build_model
from miles.services.trainer.backends.megatron.parallel import groups
from miles.services.trainer.backends.megatron.parallel.pipeline import Pipeline
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.hf_folder.pretrained import read_model
from miles.weights.naming.model_tensors import read_model_tensors, shared_by_mtp

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""TransformerEngine's attention over packed sequences takes 16-bit numbers alone."""


def compare(folder: pathlib.Path) -> dict[str, Any]:
    """Largest difference of logits from those that `write_expected` wrote, and whether all weights come back.

    An `error` says why a family cannot be converted here.
    """
    layers = json.loads((folder / "config.json").read_text()).get("num_nextn_predict_layers") or None
    config = job_config(
        folder,
        train_backend="megatron",
        mtp_num_layers=layers,
        device=DEVICE.type,
        distributed_backend=None,
        train_dtype=str(DTYPE).removeprefix("torch."),
        run_dir=str(folder / "run"),
    )
    parallel = groups.initialize(config)
    reference = load_file(folder / "expected" / "logits.safetensors")
    try:
        model = build_model(config, parallel, DTYPE)
        logits = _logits(model, parallel, reference["tokens"].numpy())
    except (ValueError, RuntimeError, AttributeError, TypeError, NotImplementedError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    source = {name: tensor.to(DTYPE).float() for name, tensor in PlainTensors(folder, torch.float32).items()}
    exporter = Exporter(model, read_model_tensors(folder), torch.float32)
    written = {name: tensor.cpu() for name, tensor in exporter.tensors()}
    shared = {name: written[str(shared_by_mtp(name))] for name in source.keys() - written.keys() if shared_by_mtp(name)}
    back = {**written, **shared}
    same = source.keys() == back.keys() and all(torch.equal(source[name], back[name]) for name in source)
    return {"logits": float((logits - reference["logits"]).abs().max()), "weights_equal": same}


def write_expected(folder: pathlib.Path) -> float:
    """Write what `compare` compares with, transformers' logits; returns the largest."""
    tokens = torch.arange(3, 27) * 3 % VOCAB
    model = read_model(folder, torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    (folder / "expected").mkdir()
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "expected" / "logits.safetensors")
    return float(logits.abs().max())


def _logits(model: MegatronModel, parallel: groups.ParallelRank, tokens: Any) -> torch.Tensor:
    """Of every token; float32 on the CPU."""
    everything = np.arange(len(tokens))
    ends = np.array([0, len(tokens)], np.int32)
    rows = LocalRows(everything, tokens, everything, ends, len(tokens), everything, everything)
    with torch.no_grad():
        return Pipeline(model, parallel, DEVICE)._forward(model.chunks[0], rows)[0].float().cpu()


def main(root: str) -> None:
    """Go through the folders below `root`."""
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for folder in sorted(pathlib.Path(root).iterdir()):
            print("RESULT", json.dumps({"folder": folder.name, **compare(folder)}), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
