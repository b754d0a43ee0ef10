"""An engine's process that shares a little GPU memory: prints the probe in hex, and frees it when a line comes."""

from __future__ import annotations

import sys

import torch

from miles.weights.transports.cuda_ipc.probe import share_probe

if __name__ == "__main__":
    shared = share_probe(torch.device(sys.argv[1]))
    assert shared is not None, "it cannot be shared"
    print(f"probe {shared.message.SerializeToString().hex()}", flush=True)
    sys.stdin.readline()
    shared.free()
    print("freed", flush=True)
    sys.stdin.readline()
