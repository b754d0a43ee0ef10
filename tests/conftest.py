"""Fixtures shared by all tests: one real Redis server, a job id per test, groups to send."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fuzz_profiles import pytest_collection_modifyitems as pytest_collection_modifyitems
from fuzz_profiles import pytest_configure as pytest_configure

# A busy machine crawls when idle BLAS threads spin; set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from miles.queue import RedisServer
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real Redis server that all tests share; keep to your own `job_id`."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def job_id() -> str:
    """A job id that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def make_group(job_id: str) -> Callable[..., SampleGroup]:
    """Builds finished groups of the test's job: make_group(group_id, samples=2, response_tokens=5, experts=None)."""

    def make(
        group_id: int,
        *,
        samples: int = 2,
        response_tokens: int = 5,
        version: int = 0,
        experts: tuple[int, int] | None = None,
    ) -> SampleGroup:
        random = np.random.default_rng(group_id)
        prompt_tokens = 3
        total = prompt_tokens + response_tokens
        made = [
            Sample(
                group_id=group_id,
                index=index,
                prompt=f"prompt {group_id}",
                tokens=random.integers(0, 1000, total).astype(np.int32),
                response_length=response_tokens,
                response="text",
                label="4",
                reward=float(index),
                status=SampleStatus.COMPLETED,
                metadata={"source": "test"},
                rollout_log_probs=-random.random(response_tokens, np.float32),
                rollout_routed_experts=None
                if experts is None
                else random.integers(0, 64, (total - 1, *experts)).astype(np.uint8),
                weight_versions=(VersionSpan(version, 0, response_tokens),),
            )
            for index in range(samples)
        ]
        return SampleGroup(job_id, group_id, made)

    return make
