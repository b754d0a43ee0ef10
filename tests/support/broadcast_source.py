"""A one-rank trainer that offers a version until its stdin ends; `next` offers another one."""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch
from broadcast_kit import publish, random_tensors, transport, write

from miles.rpc.gen import weightsync_pb2
from miles.weights.base import Endpoint, WeightTransport
from miles.weights.transports.cuda_ipc.transport import CudaIpcTransport

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cuda-ipc", action="store_true", help="share GPU memory instead of broadcasting")
    options = parser.parse_args()
    offering: WeightTransport = transport(options.device)
    kind = weightsync_pb2.TRANSPORT_KIND_COLLECTIVE
    if options.cuda_ipc:
        offering = CudaIpcTransport(Endpoint(device=torch.device(options.device)))
        kind = weightsync_pb2.TRANSPORT_KIND_CUDA_IPC
    version = 0
    while True:
        version += 1
        offering.trim([version - 1])
        tensors = {name: tensor.to(options.device) for name, tensor in random_tensors(version).items()}
        write(options.folder, publish([offering], version, tensors, 4096, kind))
        print(f"offering {version}", flush=True)
        if not sys.stdin.readline():
            break
    offering.close()
