"""Decides which requests hold a slot and what each computes in the next step. Pure: no tensors, no clock, no thread."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable

from miles.services.rollout.engines.torch.generation.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Give `target` the first `length` positions of what `source` has in the cache."""

    source: Sequence
    target: Sequence
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Carry the first `length` positions of one slot to another."""

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
        """Whether the sequence's next token can be drawn after this."""
        return self.end == len(self.sequence.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One step: first moves, then copies, then one forward pass over `decode` and `prefill`, then `shares`."""

    moves: list[Move]
    copies: list[Copy]
    decode: list[Sequence]
    """Sequences with one token to compute, by ascending slot."""
    prefill: list[Chunk]
    shares: list[Copy]
    """Sequences that draw from the same logits as `source`, whose prompt they share, and then take over its cache."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decode and not self.prefill


class Scheduler:
    """First come, first served over a fixed number of slots.

    Requests with the same prompt compute it once: the first to get a slot computes it, the others copy it.
    """

    def __init__(self, max_slots: int, max_prefill_tokens: int) -> None:
        self._max_slots = max_slots
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._slots: list[Sequence | None] = []

    @property
    def running(self) -> list[Sequence]:
        """Sequences that hold a slot, by ascending slot."""
        return [sequence for sequence in self._slots if sequence is not None]

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, next first."""
        return list(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting."""
        if sequence.slot >= 0:
            self._slots[sequence.slot] = None
            sequence.forget_cache()
        else:
            self._waiting.remove(sequence)

    def retract_all(self) -> None:
        """Send every running sequence back to the head of the queue, in order of slots, to be computed anew."""
        running = self.running
        self._slots.clear()
        for sequence in reversed(running):
            sequence.forget_cache()
            self._waiting.appendleft(sequence)

    def weights_changed(self) -> None:
        """Note that what running sequences have in the cache is of older weights and must not be shared."""
        for sequence in self.running:
            sequence.current_weights = sequence.computed == 0

    def plan(self) -> Plan:
        """Fill the slots, close the gaps between them, and choose the next step's work.

        The plan counts as carried out: `computed` of every sequence in it has moved on when this returns.
        """
        self._admit()
        moves = self._close_gaps()
        plan = Plan(moves, [], [], [], [])
        budget = self._max_prefill_tokens
        ready = {s.prompt_key: s for s in reversed(self.running) if s.computed >= s.prompt_length and s.current_weights}
        leaders = {s.prompt_key: s for s in self.running if 0 < s.computed < s.prompt_length and s.current_weights}
        for sequence in self.running:
            if sequence.computed == 0:
                leader = leaders.get(sequence.prompt_key)
                if leader is not None:
                    self._follow(sequence, leader, plan)
                    continue
                self._copy_prompt(sequence, ready.get(sequence.prompt_key), plan)
            if sequence.computed < sequence.prompt_length and sequence.current_weights:
                leaders.setdefault(sequence.prompt_key, sequence)
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

    def _close_gaps(self) -> list[Move]:
        """Move sequences from the highest slots into free lower ones, so that slots 0 to n - 1 are the ones in use."""
        moves = []
        gaps = deque(slot for slot, sequence in enumerate(self._slots) if sequence is None)
        while gaps:
            last = self._slots.pop()
            if last is None:
                gaps.pop()
                continue
            slot = gaps.popleft()
            moves.append(Move(last.slot, slot, last.computed))
            last.slot = slot
            self._slots[slot] = last
        return moves

    @staticmethod
    def _copy_prompt(sequence: Sequence, donor: Sequence | None, plan: Plan) -> None:
        length = min(sequence.prompt_length, len(sequence.tokens) - 1)
        if donor is None or length == 0:
            return
        plan.copies.append(Copy(donor, sequence, length))
        sequence.computed = sequence.cached_prompt_tokens = length

    @staticmethod
    def _follow(sequence: Sequence, leader: Sequence, plan: Plan) -> None:
        """Share the leader's logits if this step brings them and the sequence has no tokens of its own; else wait."""
        done = leader.computed == len(leader.tokens) == leader.prompt_length
        if done and len(sequence.tokens) == sequence.prompt_length:
            plan.shares.append(Copy(leader, sequence, sequence.prompt_length))
            sequence.cached_prompt_tokens = sequence.prompt_length

    @staticmethod
    def _compute(sequence: Sequence, budget: int, plan: Plan) -> int:
        """Put the sequence's next work into the plan; returns the prompt tokens it takes from the budget."""
        if sequence.pending == 1:
            plan.decode.append(sequence)
            sequence.computed += 1
            return 0
        length = min(sequence.pending, budget)
        if length > 0:
            plan.prefill.append(Chunk(sequence, sequence.computed, sequence.computed + length))
            sequence.computed += length
        return length
