"""The asyncio side of the engine: checks requests, sends commands to the worker thread, and feeds response streams."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from miles.algorithms.any_shape_attention import leave_out_cudnn
from miles.config.speculation import DraftKind, Speculation
from miles.engine_spec import EngineSpec, engine_spec
from miles.precision.emulation.experts import PADDED
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.base import (
    EngineFailed,
    EngineStats,
    GenerationDelta,
    GenerationRequest,
    PauseMode,
)
from miles.services.rollout.engines.torch.drafts.target import DraftTarget
from miles.services.rollout.engines.torch.generation.generator import GeneratorOptions
from miles.services.rollout.engines.torch.generation.outbox import Delivery
from miles.services.rollout.engines.torch.generation.request_rules import RequestRules
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.model.architecture import model_shape, read_checkpoint
from miles.services.rollout.engines.torch.worker import Worker
from miles.weights.registry import create_transport
from miles.weights.staging.ahead import AheadOnDevice

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind
    from miles.weights.base import Endpoint, WeightReceiver

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class _Staged:
    """Weights that are ready to be swapped in."""

    given: Mapping[str, torch.Tensor]
    """As they came."""
    checked: Mapping[str, torch.Tensor]
    """As they will be served."""
    parts: Mapping[str, torch.Tensor]
    """Of quantised ones, as they came."""


class TorchEngine:
    """Continuous batching of any Hugging Face causal LM on CPU or one GPU; implements `RolloutEngine`.

    A response depends only on the weights, its prompt and its seed, not on the requests beside it.

    Args:
        hf_checkpoint: folder with config.json and the tokenizer; weights come with the first `load_weights`.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        dtype: "bfloat16", "float16" or "float32": what the model computes in, and the dtype of the weights to load.
        max_running_requests: requests that decode at once; more wait their turn.
        max_total_tokens: prompt and response together; None: what the model's positions allow.
        max_prefill_tokens: prompt tokens computed in one step; longer prompts take several steps.
        experts_implementation: of transformers' experts interface; the default keeps tokens independent.
        recipe: how the weights to load are quantised; None when they are not. They are served dequantised, in `dtype`,
            and their inputs are rounded where the format rounds inputs.
        speculation: what it drafts with; None: nothing.
        threads: CPU threads of a step; None leaves torch's setting.
        command_timeout_s: how long a command to the worker thread may take, including the step it waits for.
    """

    def __init__(
        self,
        hf_checkpoint: str | pathlib.Path,
        *,
        device: str = "auto",
        dtype: str = "bfloat16",
        max_running_requests: int = 64,
        max_total_tokens: int | None = None,
        max_prefill_tokens: int = 2048,
        experts_implementation: str = PADDED,
        recipe: Recipe | None = None,
        speculation: Speculation | None = None,
        threads: int | None = None,
        command_timeout_s: float = 300.0,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
        for name, value in (("max_running_requests", max_running_requests), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._hf_checkpoint = pathlib.Path(hf_checkpoint)
        self._dtype = _DTYPES[dtype]
        self._device = torch.device(device)
        if self._device.type == "cuda":
            leave_out_cudnn()
        self._ahead = AheadOnDevice(self._device) if self._device.type == "cuda" else None
        self._staged: _Staged | None = None
        """Weights that were staged and not loaded yet."""
        self._max_running_requests = max_running_requests
        self._max_total_tokens = max_total_tokens
        self._options = functools.partial(
            GeneratorOptions,
            dtype=self._dtype,
            device=self._device,
            max_running_requests=max_running_requests,
            max_prefill_tokens=max_prefill_tokens,
            experts_implementation=experts_implementation,
            recipe=recipe,
            speculation=speculation or Speculation(DraftKind.NONE),
        )
        self._threads = threads
        self._command_timeout_s = command_timeout_s
        self._worker: Worker | None = None
        self._draft: DraftTarget | None = None
        self._streams: dict[str, asyncio.Queue[GenerationDelta | BaseException]] = {}
        self._rules: RequestRules | None = None

    @property
    def spec(self) -> EngineSpec:
        """What torch engines can take."""
        return engine_spec("torch")

    @property
    def version(self) -> int | None:
        """Policy version served now; None before the first `load_weights`."""
        return None if self._worker is None else self._worker.generator.version

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

    @property
    def draft(self) -> DraftTarget | None:
        """The draft model, once the engine has started; None without one."""
        return self._draft

    @property
    def max_running_requests(self) -> int:
        """Requests that can decode at once."""
        return self._max_running_requests

    async def start(self) -> None:
        """Build the model without weights.

        Raises UnsupportedModel when the engine cannot run the architecture, and NotEmulated when not by its recipe.
        """
        if self._worker is not None:
            raise RuntimeError("the engine was started already")
        config, tokenizer, end_tokens = await asyncio.to_thread(
            read_checkpoint, self._hf_checkpoint, self._max_total_tokens
        )
        shape = model_shape(config)
        limit = min(self._max_total_tokens or shape.max_positions, shape.max_positions)
        decoder: Any = tokenizer
        self._rules = RequestRules(decoder, end_tokens, vocabulary=shape.vocabulary, max_total_tokens=limit)
        loop = asyncio.get_running_loop()

        def deliver(batch: list[Delivery]) -> None:
            loop.call_soon_threadsafe(self._deliver, batch)

        worker = Worker(config, self._options(max_total_tokens=limit), self._threads, deliver)
        with contextlib.ExitStack() as undo:
            undo.callback(worker.submit, worker.close)  # it ends once it has built the model
            await self._finish(worker.start(), "building the model")
            undo.pop_all()
        self._worker = worker
        drafting = worker.generator.drafting
        if drafting is not None and drafting.proposer.weights is not None:
            self._draft = DraftTarget(drafting.proposer.weights, self._device, self._call)

    async def close(self) -> None:
        """Abort everything and free the model."""
        if self._ahead is not None:
            self._ahead.close()
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        await self._finish(worker.submit(worker.close), "closing")
        if not await asyncio.to_thread(worker.join, self._command_timeout_s):
            raise TimeoutError(f"the engine's thread did not end within {self._command_timeout_s:.0f} s")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Stream a response, a few tokens at a time. Leaving the iterator early aborts the request.

        Raises ValueError listing all faults of a request that the engine cannot serve, and EngineFailed when a step
        failed or the weights give NaN. After a failed step the engine serves nothing until it is built again.
        """
        worker = self._started()
        assert self._rules is not None
        self._rules.check(request, running=request.request_id in self._streams)
        stream: asyncio.Queue[GenerationDelta | BaseException] = asyncio.Queue()
        self._streams[request.request_id] = stream
        sequence = Sequence(request, self._rules.stop_rule(request.sampling))
        ended = False
        try:
            await self._call(lambda: worker.generator.add(sequence), f"request {request.request_id}")
            while not ended:
                delta = await stream.get()
                if isinstance(delta, BaseException):
                    ended = True
                    raise EngineFailed(f"request {request.request_id}: {delta}") from delta
                ended = delta.result is not None
                yield delta
        finally:
            del self._streams[request.request_id]
            if not ended:
                worker.submit(lambda: worker.generator.abort([request.request_id]))

    async def abort(self, request_ids: Collection[str] | None = None) -> None:
        """End these requests (None: all) with what they have, reason ABORT."""
        worker = self._started()
        ids = None if request_ids is None else list(request_ids)
        await self._call(lambda: worker.generator.abort(ids), "aborting")

    async def pause(self, mode: PauseMode) -> None:
        """Return once no step is running and none will start before `resume`."""
        worker = self._started()
        await self._call(lambda: worker.pause(mode), f"pausing ({mode.value})")

    async def resume(self) -> None:
        """Continue decoding."""
        await self._call(self._started().resume, "resuming")

    async def stage_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Check weights, dequantise them, and copy them to a GPU that has room for them, while decoding continues.

        Raises WeightsRefused if a name, shape or dtype does not match.
        """
        self._staged = None
        self._staged = await self._stage(tensors)

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in a full set of weights between two steps; return the pause time in seconds.

        On CPU the tensors themselves are served, with no copy. Running requests keep their keys and values unless they
        were retracted before. Raises WeightsRefused before anything changed if a name, shape or dtype does not match.
        """
        staged, self._staged = self._staged, None
        if staged is None or staged.given is not tensors:
            staged = await self._stage(tensors)
        generator, checked = self._started().generator, staged.checked
        pause_s = await self._call(lambda: generator.load(version, checked), f"loading version {version}")
        if generator.quantised is not None:
            generator.quantised.keep(staged.parts)
        return pause_s

    async def _stage(self, given: Mapping[str, torch.Tensor]) -> _Staged:
        generator = self._started().generator
        quantised, tensors = generator.quantised, given
        parts: dict[str, torch.Tensor] = {}
        if quantised is not None:
            parts = await asyncio.to_thread(quantised.parts_of, tensors)
            tensors = await asyncio.to_thread(quantised.restored, tensors, parts)
        checked: Mapping[str, torch.Tensor] = generator.parameters.check(tensors)
        if self._ahead is not None:
            checked = await asyncio.to_thread(self._ahead.copied, checked)
        return _Staged(given, checked, parts)

    def create_receiver(self, kind: TransportKind.ValueType, endpoint: Endpoint) -> WeightReceiver:
        """Build the receiver that gets the bytes of new weights into this process."""
        return create_transport(kind, endpoint)

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name, tied ones once; empty before the first `load_weights`.

        Quantised ones are returned as they arrived; raises ChecksumMismatch when the served weights are not what these
        stand for.
        """
        generator = self._started().generator
        served = await self._call(lambda: generator.parameters.served, "reading the weights")
        if generator.quantised is None or not served:
            return served
        return await asyncio.to_thread(generator.quantised.as_received, served)

    async def release_memory(self) -> int:
        """Free nothing: the weights belong to the transport, and the cache is small."""
        return 0

    def stats(self) -> EngineStats:
        """Counters as of now."""
        worker = self._started()
        drafting = worker.generator.drafting
        return EngineStats(
            running_requests=len(worker.generator.scheduler.running),
            waiting_requests=len(worker.generator.scheduler.waiting),
            generated_tokens=worker.generator.generated_tokens,
            busy_s=worker.busy_s,
            speculation=None if drafting is None else drafting.state,
        )

    def _started(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("the engine is not running: call start() first, and nothing after close()")
        return self._worker

    async def _call(self, call: Callable[[], T], what: str) -> T:
        return await self._finish(self._started().submit(call), what)

    async def _finish(self, future: concurrent.futures.Future[T], what: str) -> T:
        try:
            async with asyncio.timeout(self._command_timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise TimeoutError(
                f"{what}: the engine's thread did not answer within {self._command_timeout_s:.0f} s"
            ) from None

    def _deliver(self, batch: list[Delivery]) -> None:
        for request_id, delta in batch:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(delta)
