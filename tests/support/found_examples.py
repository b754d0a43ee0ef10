"""The folder of examples that failed once: fuzzing adds to it, every other run replays it."""

from __future__ import annotations

import hashlib
import pathlib

from hypothesis.database import DirectoryBasedExampleDatabase

FOLDER = pathlib.Path(__file__).parents[1] / "found_examples"


class FoundExamples(DirectoryBasedExampleDatabase):
    """Keeps the smallest example of every failure, also once it passes.

    Hypothesis would delete an example that no longer fails: just when it becomes a regression test.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        self._added: set[tuple[bytes, bytes]] = set()

    def save(self, key: bytes, value: bytes) -> None:
        # Smallest failures are under the digest of their test. Longer keys are for larger failures and for examples
        # that did not fail, a shorter one for the list of keys.
        if len(key) == hashlib.sha384().digest_size and value not in self.fetch(key):
            self._added.add((key, value))
            super().save(key, value)

    def move(self, src: bytes, dest: bytes, value: bytes) -> None:
        # Hypothesis moves an example away when it has found a smaller one; only those of this run may go.
        if (src, value) in self._added:
            super().delete(src, value)

    def delete(self, key: bytes, value: bytes) -> None:
        pass
