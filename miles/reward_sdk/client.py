"""The client of reward services: one stream a service with many requests at once, deadlines and retries."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from miles.reward_names import DEFAULT_SERVICE, SERVICE_KEY
from miles.reward_sdk.answers import Answers
from miles.rpc import connect
from miles.rpc.gen import reward_pb2, reward_pb2_grpc
from miles.tasks import cancel
from miles.types import MalformedMessage, Reward, Sample
from miles.types.convert import encode_samples, json_from_text, reward_from_proto

logger = logging.getLogger(__name__)

_BACK_OFF_S = 0.1
_MAX_BACK_OFF_S = 2.0
_MESSAGE_TOKENS = 1 << 16
"""Most tokens of samples that share a message: about a megabyte. A sample that alone has more gets its own message."""
_WATCH_S = 1.0
"""How often a service that cannot be reached is asked why."""

_Call: TypeAlias = "grpc.aio.StreamStreamCall[reward_pb2.ScoreRequest, reward_pb2.ScoreResponse]"


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreOutcome:
    """The result for one sample: a reward, or an error."""

    reward: Reward | None = None
    error: str | None = None
    """Why there is no reward; the sample is to be marked FAILED."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """To be merged into the sample's metadata."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceWait:
    """Samples that wait for one reward service."""

    service: str
    """Its name and address."""
    samples: int
    since_unix_s: float
    """When the first of them was sent."""
    error: str
    """Words of the last failed attempt; empty when there was none since the last answer."""
    failures: int
    """Failed attempts since the last answer, a count."""


class _Unscored(Exception):
    """Why samples get no scores."""


class _Unanswered(_Unscored):
    """An attempt ended without an answer; a retry may get one."""


class _Stream:
    """One Score stream, from its start until it breaks and every request on it fails with `_Unanswered`."""

    def __init__(self, stub: reward_pb2_grpc.RewardServiceStub, label: str) -> None:
        self.broken = False
        self._label = label
        self._call: _Call = stub.Score(wait_for_ready=True)
        self._outgoing: asyncio.Queue[reward_pb2.ScoreRequest] = asyncio.Queue()
        self._answers: Answers[reward_pb2.ScoreResponse] = Answers()
        # Requests are written from one task: cancelling a write, as a caller's deadline would, cancels the whole call.
        self._writing = asyncio.create_task(self._write())
        self._reading = asyncio.create_task(self._read())

    async def ask(self, request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        """Send a request and wait for its answer."""
        return await self._answers.ask(request.request_id, lambda: self._outgoing.put_nowait(request))

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` sees how the call ended
            while True:
                request = await self._outgoing.get()
                if request.request_id in self._answers:
                    await self._call.write(request)

    async def _read(self) -> None:
        problem = "the stream was closed"
        try:
            async for response in self._call:
                self._answers.put(response.request_id, response)
        except grpc.aio.AioRpcError as error:
            problem = f"{error.code().name}: {error.details()}"
        finally:
            self.broken = True
            self._writing.cancel()
            self._answers.fail(lambda: _Unanswered(problem))
        logger.info("stream to %s ended: %s", self._label, problem)

    async def close(self) -> None:
        """End the call."""
        self._call.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, self._writing, return_exceptions=True)


class _Service:
    """The connection to one reward service. Its stream is opened when needed, and again after it breaks."""

    def __init__(self, name: str, address: str) -> None:
        self.label = f"reward service {name!r} at {address}"
        self._channel = connect(address)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._stream: _Stream | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[int, float]] = {}
        """Samples, and since when they wait in seconds since the Unix epoch, of each request that is not answered."""
        self._watching: asyncio.Task[None] | None = None
        self._error = ""
        """Words of the last failure, as long as nothing was answered since."""
        self._failures = 0

    async def ask(self, request: reward_pb2.ScoreRequest, timeout_s: float) -> reward_pb2.ScoreResponse:
        """Make one attempt, connecting included. Raises _Unanswered when there is no answer within `timeout_s`."""
        request.request_id = next(self._ids)
        # The service gets a little less time than we wait, so that it can still answer with what took too long.
        request.deadline_ms = max(1, int(1000 * (timeout_s - min(1.0, timeout_s / 10))))
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._stub, self.label)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._stream.ask(request)
        except TimeoutError:
            raise _Unanswered(f"no answer in {timeout_s:g} s; connection {self._channel.get_state().name}") from None

    @contextlib.contextmanager
    def waiting(self, samples: int) -> Iterator[None]:
        """Samples wait for the service inside the block."""
        key = next(self._ids)
        self._pending[key] = (samples, time.time())
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            del self._pending[key]

    def fail(self, error: str) -> None:
        """Note a failed attempt."""
        self._error = error
        self._failures += 1

    def succeed(self) -> None:
        """Note an answer."""
        self._error, self._failures = "", 0

    def wait(self) -> ServiceWait | None:
        """Return how many samples wait for the service; None when none does."""
        if not self._pending:
            return None
        samples, since_s = zip(*self._pending.values(), strict=True)
        return ServiceWait(self.label, sum(samples), min(since_s), self._error, self._failures)

    async def _watch(self) -> None:
        """While samples wait and there is no connection, find out why: a stream that waits for one does not say it."""
        while self._pending:
            await asyncio.sleep(_WATCH_S)
            if self._pending and self._channel.get_state() is not grpc.ChannelConnectivity.READY:
                try:
                    await self._stub.Describe(reward_pb2.DescribeRequest(), timeout=_WATCH_S)
                except grpc.aio.AioRpcError as error:
                    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                        self.fail(f"it cannot be reached: {(error.details() or '').rpartition('last error: ')[2]}")

    async def close(self) -> None:
        """End the stream and the connection; running requests fail."""
        if self._watching is not None:
            await cancel(self._watching)
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()


class RewardClient:
    """Scores samples with the reward services of a job. Use within one event loop; `close` it."""

    def __init__(self, addresses: Mapping[str, str], *, timeout_s: float = 60.0, retries: int = 3) -> None:
        """Prepare the connections; they are made when first needed.

        Args:
            addresses: host:port of each service by name; "default" scores samples that name none.
            timeout_s: how long one attempt may take, connecting included, in seconds.
            retries: further attempts after one without an answer, a count. An answer that says the reward function
                failed is final.
        """
        if timeout_s <= 0 or retries < 0:
            raise ValueError(f"timeout_s is {timeout_s} and retries {retries}; they must be above 0 and at least 0")
        self._timeout_s = timeout_s
        self._retries = retries
        self._addresses = dict(addresses)
        self._services: dict[str, _Service] = {}

    async def __aenter__(self) -> RewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def score(self, samples: Sequence[Sample], *, reward: str = "", group: bool = False) -> list[ScoreOutcome]:
        """Score samples, each on its own or, with `group`, together; returns one outcome a sample, in order.

        A service that fails or is not there gives outcomes with an error, never an exception.
        A sample's `metadata["reward_service"]` names the service (default: "default"); `reward` names the reward there
        (empty: the service's default).
        """
        if not samples:
            return []
        if group:
            return await self._score(samples, reward, group=True)
        by_service: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            by_service.setdefault(_service_of(sample), []).append(i)
        parts = [part for positions in by_service.values() for part in _messages(samples, positions)]
        if len(parts) == 1:
            return await self._score(samples, reward, group=False)
        scored = await asyncio.gather(*(self._score([samples[i] for i in part], reward, group=False) for part in parts))
        outcomes = {
            i: found for part, each in zip(parts, scored, strict=True) for i, found in zip(part, each, strict=True)
        }
        return [outcomes[i] for i in range(len(samples))]

    async def _score(self, samples: Sequence[Sample], reward: str, *, group: bool) -> list[ScoreOutcome]:
        try:
            service = self._service(samples)
            request = reward_pb2.ScoreRequest(reward=reward, group=group)
            encode_samples([_without_experts(sample) for sample in samples], request.samples)
            with service.waiting(len(samples)):
                response = await self._ask(service, request)
            if len(response.scores) != len(samples):
                raise _Unscored(f"{service.label} gave {len(response.scores)} scores for {len(samples)} samples")
        except MalformedMessage as error:
            if len(samples) > 1 and not group:  # the others are not to blame
                alone = await asyncio.gather(*(self._score([sample], reward, group=False) for sample in samples))
                return [outcome for [outcome] in alone]
            return [ScoreOutcome(error=str(error))] * len(samples)
        except _Unscored as error:
            return [ScoreOutcome(error=str(error))] * len(samples)
        return [_outcome(score, service.label) for score in response.scores]

    async def _ask(self, service: _Service, request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        attempts = self._retries + 1
        for attempt in itertools.count(1):
            try:
                response = await service.ask(request, self._timeout_s)
                service.succeed()
                return response
            except _Unanswered as error:
                service.fail(str(error))
                if attempt == attempts:
                    within = f"{attempts} attempt{'s' * (attempts > 1)} of up to {self._timeout_s:g} s"
                    raise _Unanswered(f"{service.label} did not score within {within}: {error}") from error
            await asyncio.sleep(min(_MAX_BACK_OFF_S, _BACK_OFF_S * 2 ** (attempt - 1)))
        raise AssertionError("unreachable")

    @property
    def patience_s(self) -> float:
        """How long a sample waits at most, in seconds."""
        return self._timeout_s * (self._retries + 1)

    def waits(self) -> list[ServiceWait]:
        """Return the services that samples wait for now."""
        return [wait for service in self._services.values() if (wait := service.wait()) is not None]

    def _service(self, samples: Sequence[Sample]) -> _Service:
        names = {_service_of(sample) for sample in samples}
        if len(names) > 1:
            raise _Unscored(f"the samples of one group name several reward services: {', '.join(sorted(names))}")
        [name] = names
        if name not in self._addresses:
            known = ", ".join(self._addresses) or "none"
            raise _Unscored(
                f"no reward service is named {name!r} (known: {known}); add --reward-service {name}=HOST:PORT"
            )
        if name not in self._services:
            address = self._addresses[name]
            # A default that is also a service with a name of its own is known by that.
            own = (known for known, where in self._addresses.items() if where == address and known != DEFAULT_SERVICE)
            self._services[name] = _Service(next(own, name), address)
        return self._services[name]

    async def close(self) -> None:
        """Close the connections; running requests fail."""
        await asyncio.gather(*(service.close() for service in self._services.values()))
        self._services.clear()


def _service_of(sample: Sample) -> str:
    return str(sample.metadata.get(SERVICE_KEY, DEFAULT_SERVICE))


def _messages(samples: Sequence[Sample], positions: Sequence[int]) -> Iterator[list[int]]:
    """Split positions so that each part's samples fit well into a message."""
    part: list[int] = []
    tokens = 0
    for position in positions:
        tokens += len(samples[position].tokens)
        if part and tokens > _MESSAGE_TOKENS:
            yield part
            part, tokens = [], len(samples[position].tokens)
        part.append(position)
    if part:
        yield part


def _without_experts(sample: Sample) -> Sample:
    if sample.rollout_routed_experts is None:
        return sample
    return dataclasses.replace(sample, rollout_routed_experts=None)  # megabytes that no reward uses


def _outcome(score: reward_pb2.Score, label: str) -> ScoreOutcome:
    if score.WhichOneof("kind") == "error":
        return ScoreOutcome(error=score.error)
    try:
        reward = reward_from_proto(score.reward)
        metadata = json_from_text(score.metadata_json, "metadata_json") if score.metadata_json else {}
    except MalformedMessage as error:
        return ScoreOutcome(error=f"{label} answered with a malformed score: {error}")
    numbers = list(reward.values()) if isinstance(reward, dict) else [reward]
    if not numbers or not all(map(math.isfinite, numbers)):
        return ScoreOutcome(error=f"{label} answered with the reward {reward}; rewards are finite numbers")
    if not isinstance(metadata, dict):
        return ScoreOutcome(error=f"{label} answered with metadata that is not a JSON object: {metadata!r:.200}")
    return ScoreOutcome(reward=reward, metadata=metadata)
