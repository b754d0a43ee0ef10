"""The garbage collector of a process that keeps much and has to answer at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside the block, leave everything that lives now out of garbage collections.

    Modules and prompts are hundreds of thousands of objects that are never garbage, and each full collection would look
    at all of them, for 0.2 s on a slow core. What nobody refers to any more is freed all the same, unless in a cycle.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
