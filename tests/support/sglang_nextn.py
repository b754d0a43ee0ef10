"""Run by SGLang's interpreter: which parameters of its NextN draft a folder's tensors fill. Prints a JSON object."""

from __future__ import annotations

import json
import pathlib
import socket
import sys

import torch
from safetensors.torch import load_file


def main(folder: str) -> None:
    """Build the draft of the model in a folder on the CPU, fill it with NaN, and load the folder's tensors."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    flags = ServerArgs(
        model_path=folder, device="cpu", dtype="float32", attention_backend="torch_native", trust_remote_code=True
    )
    publish(flags, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bootstrap._init_parallel_groups(
        backend="gloo", dist_init_method=f"tcp://127.0.0.1:{port}", server_args=flags, gpu_id=0
    )
    config = ModelConfig.from_server_args(flags, is_draft_model=True).hf_config
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures)
    torch.set_default_dtype(torch.float32)
    draft = kind(config=config, quant_config=None)
    for parameter in draft.parameters():
        parameter.data.fill_(float("nan"))
    draft.load_weights(list(load_file(pathlib.Path(folder) / "model.safetensors").items()))
    empty = sorted(name for name, parameter in draft.named_parameters() if parameter.isnan().any())
    print(
        "RESULT", json.dumps({"draft": kind.__name__, "empty": empty, "shares": hasattr(draft, "set_embed_and_head")})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
