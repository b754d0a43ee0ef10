"""An engine's process that shares a little GPU memory: prints the probe in hex, and frees it when a line comes.

Where memory cannot be shared, it prints "cannot share" instead.
"""

from __future__ import annotations

import sys

import torch

from miles.weights.transports.cuda_ipc.probe import share_probe


def main() -> None:
    """Share memory of the GPU that the first argument names."""
    shared = share_probe(torch.device(sys.argv[1]))
    if shared is None:
        print("cannot share", flush=True)
        return
    print(f"probe {shared.message.SerializeToString().hex()}", flush=True)
    sys.stdin.readline()
    shared.free()
    print("freed", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
