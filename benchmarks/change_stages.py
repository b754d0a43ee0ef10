"""GB/s of one core in each stage of a version that goes as changes; CPU time, so that other processes matter less.

    python -m benchmarks.change_stages --shares 0.01 0.05 1.0

The rates are of the version's bytes, not of the change's: 64 MB of bfloat16 values, of which a share moves by 1 %.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from miles.services.trainer.changes.shard_change import apply_change, find_change
from miles.weights.manifest import checksum
from miles.weights.transports.disk_delta import codec

VALUES = 1 << 25
REPEATS = 5


def rate(work: Callable[[], object], nbytes: int) -> float:
    """GB/s of a call, the median of several after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return nbytes / statistics.median(times[1:]) / 1e9


def encoded(encoding: codec.Encoding, old: codec.Bytes, new: codec.Bytes) -> list[bytes]:
    """A tensor's change as disk_delta writes it."""
    return [codec.encode(encoding, old[piece], new[piece], 2) for piece in codec.pieces(old.size)]


def apply_frames(encoding: codec.Encoding, frames: list[bytes], target: codec.Bytes) -> None:
    """What an engine does with it."""
    for frame, piece in zip(frames, codec.pieces(target.size), strict=True):
        codec.apply(encoding, frame, target[piece], 2)


def stages(share: float) -> dict[str, str]:
    """Rates by stage, and sizes of the change."""
    old = torch.randn(VALUES).mul_(0.02).bfloat16()
    new = torch.where(torch.rand(VALUES) < share, old * 1.01, old)
    before, after = (tensor.view(torch.uint8).numpy() for tensor in (old, new))
    change, target = find_change(old, new), old.clone()
    rates = {
        "rank: compare": rate(lambda: find_change(old, new), old.nbytes),
        "rank 0: copy": rate(old.clone, old.nbytes),
        "rank 0: apply": rate(lambda: apply_change(change, target), old.nbytes),
        "both ends: xxh3": rate(lambda: checksum(after.data), old.nbytes),
    }
    sizes = {"gathered": change.data.numel()}
    for encoding in (codec.Encoding.XOR, codec.Encoding.OVERWRITE):
        encode = functools.partial(encoded, encoding, before, after)
        frames = encode()
        rates[f"rank 0: encode {encoding.value}"] = rate(encode, old.nbytes)
        apply = functools.partial(apply_frames, encoding, frames, before.copy())
        rates[f"engine: apply {encoding.value}"] = rate(apply, old.nbytes)
        sizes[f"written, {encoding.value}"] = sum(map(len, frames))
    shown = {stage: f"{each:.2f} GB/s" for stage, each in rates.items()}
    return shown | {what: f"{size / old.nbytes:.2%}" for what, size in sizes.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 1.0], help="of the values that change")
    shares = parser.parse_args().shares
    torch.set_num_threads(1)
    columns = [stages(share) for share in shares]
    table = Table(title="One core, bfloat16")
    for name in ("", *(f"{share:.0%} changed" for share in shares)):
        table.add_column(name, justify="right" if name else "left")
    for stage in columns[0]:
        table.add_row(stage, *(column[stage] for column in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
