"""A trainer of one rank on a GPU, towards a real weightsync service: publishes a model's weights when told a version.

On stdin `VERSION SEED`; answers `published VERSION` when the version is PREPARED.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch_engine_models import tiny_config
from transformers import AutoModelForCausalLM

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher
from miles.weights.base import Endpoint
from miles.weights.transports.names import TRANSPORT_OF_MODE


def weights(family: str, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a trainer would export, tied tensors once."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    return {name: p.detach().to(dtype) for name, p in model.named_parameters(remove_duplicate=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--family", required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    publisher = WeightPublisher(
        weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(options.address)),
        "job/1",
        policy_pb2.WEIGHT_STREAM_POLICY,
        TRANSPORT_OF_MODE[options.mode],
        endpoint=Endpoint(options.address, device),
        bucket_bytes=100_000,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        version, seed = map(int, line.split())
        tensors = weights(options.family, seed, getattr(torch, options.dtype))
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in on_device.items()]
        publisher.publish(version, version, layout, on_device.items())
        print(f"published {version}", flush=True)
    publisher.close()
