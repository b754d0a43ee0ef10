"""A trainer of one rank that offers a version and does nothing more until its stdin ends."""

from __future__ import annotations

import pathlib
import sys

from broadcast_kit import publish, random_tensors, transport, write

if __name__ == "__main__":
    offering = transport()
    write(pathlib.Path(sys.argv[1]), publish([offering], 1, random_tensors(1), 4096))
    print("offering", flush=True)
    sys.stdin.read()
    offering.close()
