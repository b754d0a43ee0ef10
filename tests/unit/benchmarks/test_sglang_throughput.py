"""The comparison of the rollout service with bare SGLang, without SGLang."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.sglang_throughput import Case, measure_all, table
from benchmarks.gpu.workload import PROMPT_TOKENS, Workload
from miles.services.rollout.engines.sglang.requests.concurrency import ConcurrencyLimit

LOAD = Workload(model="", groups=64, samples=8, tokens=512)


class Answering:
    """Answers each round at once, as a peer does, or ends when it has answered so many."""

    started_s = 1.0

    def __init__(self, tokens_per_s: float, ends_after: float = float("inf")) -> None:
        self.asked: list[int] = []
        self._rate = tokens_per_s
        self._ends_after = ends_after
        self.name = "answering"

    def heard(self, deadline_s: float) -> bool:
        """At once."""
        return True

    def next(self, deadline_s: float) -> dict[str, Any]:
        """It is ready."""
        return {"ready": True}

    def measure(self, tokens: int, deadline_s: float) -> dict[str, Any]:
        """A round."""
        if len(self.asked) >= self._ends_after:
            raise RuntimeError("answering ended")
        self.asked.append(tokens)
        return {"tokens": tokens, "seconds": tokens / self._rate}


def case(name: str, bare: Any, service: Any) -> Case:
    """A case with these peers."""
    return Case(name, LOAD, bare, service)


def test_rounds_alternate_after_short_ones_and_their_ratios_are_of_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare, service = Answering(100.0), Answering(96.0)
    compared = case("dense", bare, service)
    measure_all([compared], 5, 0.0, float("inf"))
    assert bare.asked == service.asked == [32, 32, 512, 512, 512, 512, 512]
    assert table([compared]).splitlines()[1].split() == ["dense", "5", "100", "96", "96.0%", "96.0%", "96.0%"]
    assert "96.0%" in capsys.readouterr().out


def test_a_peer_that_ends_costs_its_case_the_rounds_that_follow_and_others_none() -> None:
    lost = case("moe", Answering(100.0), Answering(100.0, ends_after=4))
    other = case("dense", Answering(100.0), Answering(100.0))
    measure_all([lost, other], 5, 0.0, float("inf"))
    assert len(lost.answers) == 2
    assert len(other.answers) == 5


def test_a_deadline_that_has_passed_leaves_a_table_without_rounds() -> None:
    late = case("dense", Answering(100.0), Answering(100.0))
    measure_all([late], 5, 0.0, 1.0)
    assert late.answers == []
    assert table([late]).splitlines()[1].split() == ["dense", "0"]


@pytest.mark.parametrize("tokens", [16, 256, 512, 4096])
def test_the_cache_has_room_enough_at_the_end_of_a_round_that_a_service_keeps_its_limit(tokens: int) -> None:
    load = Workload(model="", groups=64, samples=8, tokens=tokens)
    limit = ConcurrencyLimit(512)
    used = 512 * (PROMPT_TOKENS + tokens)
    limit.observe(cache_use=used / load.server_flags["max_total_tokens"], running=512, waiting=0)
    assert limit.limit == 512
