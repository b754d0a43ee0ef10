"""The scheduler: which requests hold a KV slot and what each computes in the next step.

Pure: no tensors, no clock, no thread.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable

from miles.services.rollout.engines.torch.generation.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first `length` cached positions of `source` to `target`."""

    source: Sequence
    target: Sequence
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Move the first `length` cached positions from one KV slot to another."""

    source: int
    target: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions `start` to `end` - 1 of a sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.end == len(self.sequence.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One step: moves (compaction), then copies, then one forward pass over `decode` and `prefill`, then `shares`."""

    moves: list[Move]
    copies: list[Copy]
    decode: list[Sequence]
    """Sequences with one token to compute, by ascending KV slot."""
    prefill: list[Chunk]
    shares: list[Copy]
    """Sequences that sample from the logits of `source`, which owns their shared prefix, and then copy its cache."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decode and not self.prefill


class Scheduler:
    """First come, first served over a fixed number of KV slots.

    Requests with the same prompt compute it once: the first to get a slot owns the shared prefix and computes it, the
    others copy it.
    """

    def __init__(self, max_slots: int, max_prefill_tokens: int) -> None:
        self._max_slots = max_slots
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._slots: list[Sequence | None] = []

    @property
    def running(self) -> list[Sequence]:
        """Sequences that hold a KV slot, by ascending slot."""
        return [sequence for sequence in self._slots if sequence is not None]

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without a KV slot, next first."""
        return list(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting."""
        if sequence.slot >= 0:
            self._slots[sequence.slot] = None
            sequence.forget_cache()
        else:
            self._waiting.remove(sequence)

    def retract_all(self) -> None:
        """Return every running sequence to the head of the queue, in order of slots, to be computed again."""
        running = self.running
        self._slots.clear()
        for sequence in reversed(running):
            sequence.forget_cache()
            self._waiting.appendleft(sequence)

    def weights_changed(self) -> None:
        """Mark the cache of running sequences as computed with older weights, so that it is not shared."""
        for sequence in self.running:
            sequence.current_weights = sequence.computed == 0

    def plan(self) -> Plan:
        """Fill the KV slots, compact them, and choose the next step's work.

        The plan counts as carried out: `computed` of every sequence in it is already that of after the step.
        """
        self._admit()
        moves = self._compact()
        plan = Plan(moves, [], [], [], [])
        budget = self._max_prefill_tokens
        ready = {s.prompt_key: s for s in reversed(self.running) if s.computed >= s.prompt_length and s.current_weights}
        prefix_owners = {
            s.prompt_key: s for s in self.running if 0 < s.computed < s.prompt_length and s.current_weights
        }
        for sequence in self.running:
            if sequence.computed == 0:
                owner = prefix_owners.get(sequence.prompt_key)
                if owner is not None:
                    self._share_prefix(sequence, owner, plan)
                    continue
                self._copy_prompt(sequence, ready.get(sequence.prompt_key), plan)
            if sequence.computed < sequence.prompt_length and sequence.current_weights:
                prefix_owners.setdefault(sequence.prompt_key, sequence)
            budget -= self._compute(sequence, budget, plan)
        for share in plan.shares:
            share.target.computed = share.length
        return plan

    def _admit(self) -> None:
        free: Iterable[int] = [i for i, sequence in enumerate(self._slots) if sequence is None]
        free = [*free, *range(len(self._slots), self._max_slots)]
        for slot in free:
            if not self._waiting:
                break
            sequence = self._waiting.popleft()
            sequence.slot = slot
            if slot == len(self._slots):
                self._slots.append(sequence)
            else:
                self._slots[slot] = sequence

    def _compact(self) -> list[Move]:
        """Move sequences from the highest KV slots into free lower ones, so that slots 0 to n - 1 are in use.

        One that has computed nothing, as it waits for another to compute their prompt, just gets another slot: the
        cache may have no room for its old one yet.
        """
        moves = []
        free = deque(slot for slot, sequence in enumerate(self._slots) if sequence is None)
        while free:
            last = self._slots.pop()
            if last is None:
                free.pop()
                continue
            slot = free.popleft()
            if last.computed:
                moves.append(Move(last.slot, slot, last.computed))
            last.slot = slot
            self._slots[slot] = last
        return moves

    @staticmethod
    def _copy_prompt(sequence: Sequence, source: Sequence | None, plan: Plan) -> None:
        length = min(sequence.prompt_length, len(sequence.tokens) - 1)
        if source is None or length == 0:
            return
        plan.copies.append(Copy(source, sequence, length))
        sequence.computed = sequence.cached_prompt_tokens = length

    @staticmethod
    def _share_prefix(sequence: Sequence, owner: Sequence, plan: Plan) -> None:
        """Share the owner's logits if this step yields them and the sequence has no response tokens yet; else wait."""
        done = owner.computed == len(owner.tokens) == owner.prompt_length
        if done and len(sequence.tokens) == sequence.prompt_length:
            plan.shares.append(Copy(owner, sequence, sequence.prompt_length))
            sequence.cached_prompt_tokens = sequence.prompt_length

    @staticmethod
    def _compute(sequence: Sequence, budget: int, plan: Plan) -> int:
        """Add the sequence's next work to the plan; return the prompt tokens that it takes from the budget."""
        if sequence.pending == 1:
            plan.decode.append(sequence)
            sequence.computed += 1
            return 0
        length = min(sequence.pending, budget)
        if length > 0:
            plan.prefill.append(Chunk(sequence, sequence.computed, sequence.computed + length))
            sequence.computed += length
        return length
