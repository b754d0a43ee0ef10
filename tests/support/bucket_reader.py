"""A server's process: reads buckets as it gets their handles, one a line, and prints checksums of the tensors in each.

It copies the bytes and lets go of the bucket before it answers, and does not wait for the copies, as servers do.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys

import torch

from miles.weights.manifest import checksum


def main() -> None:
    """Answer every line; the copies of all buckets are compared when `done` comes."""
    copies: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        if line.strip() == "done":
            found = {name: checksum(copy.cpu().numpy().data).hex() for name, copy in copies.items()}
            print(json.dumps(found), flush=True)
            continue
        read = pickle.loads(base64.b64decode(line))
        for entry in read["metadata"]:
            copies[entry.name] = read["flattened_tensor"][entry.start_idx : entry.end_idx].clone()
        del read
        print("read", flush=True)


if __name__ == "__main__":
    main()
