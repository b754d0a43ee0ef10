"""Real processes of the weightsync service and of engines, and the calls that a trainer and a controller make."""

from __future__ import annotations

import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import PublishResult, WeightPublisher
from miles.weights.base import Endpoint
from miles.weights.manifest import checksum

JOB = "job/1"
DEADLINE_S = 200.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Lines:
    """A process whose stdout is read line by line; every wait ends."""

    def __init__(
        self, arguments: list[str], wrapper: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """`wrapper`: a command that runs the process, given as its last arguments; `environment` has more variables."""
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **(environment or {})},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.seen: list[Any] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, accept: Callable[[str], bool], what: str) -> str:
        """The next line that is accepted."""
        end = time.monotonic() + DEADLINE_S
        while (left := end - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                raise AssertionError(f"process ended before {what}; it said {self.seen}")
            self.seen.append(line)
            if accept(line):
                return line
        raise AssertionError(f"no {what} within {DEADLINE_S:g} s; it said {self.seen}")

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)


class Service(Lines):
    """The weightsync service."""

    def __init__(
        self,
        state_dir: pathlib.Path | None,
        directory: pathlib.Path,
        listen: str = "127.0.0.1:0",
        options: Sequence[str] = (),
    ) -> None:
        state = [] if state_dir is None else ["--state-dir", str(state_dir)]
        super().__init__(
            ["-m", "miles.services.weightsync", "--listen", listen, "--directory", str(directory), *state, *options]
        )
        self.address = self.wait_for(lambda line: line.startswith("listening on "), "address").split()[-1]
        self.stub = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(self.address))
        self._publishers: dict[tuple[str, int, str], WeightPublisher] = {}

    def publish(
        self,
        version: int,
        tensors: Mapping[str, torch.Tensor],
        stream: str = "policy",
        job: str = JOB,
        transport: str = "UNSPECIFIED",
        **settings: Any,
    ) -> PublishResult:
        """What the trainer does; one publisher lives on for each stream and transport."""
        number = policy_pb2.WeightStream.Value(f"WEIGHT_STREAM_{stream.upper()}")
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        key = (job, number, transport)
        if key not in self._publishers:
            kind = weightsync_pb2.TransportKind.Value(f"TRANSPORT_KIND_{transport}")
            self._publishers[key] = WeightPublisher(
                *(self.stub, job, number, kind), endpoint=Endpoint(address=self.address), **settings
            )
        return self._publishers[key].publish(version, version, layout, tensors.items())

    def activate(
        self,
        version: int,
        min_engines: int,
        deadline_s: float = 30.0,
        operation_id: str = "",
        check_equal: bool = False,
        stream: str = "policy",
        job: str = JOB,
    ) -> weightsync_pb2.ActivateDone:
        """What the controller does; raises grpc.RpcError when the activation fails."""
        number = policy_pb2.WeightStream.Value(f"WEIGHT_STREAM_{stream.upper()}")
        request = weightsync_pb2.ActivateRequest(
            version=policy_pb2.WeightVersion(job_id=job, stream=number, version=version),
            operation_id=operation_id or f"activate-{stream}-{version}-{time.monotonic_ns()}",
            deadline_ms=int(deadline_s * 1000),
            min_engines=min_engines,
            check_equal=check_equal,
        )
        *_, last = self.stub.Activate(request, timeout=DEADLINE_S, wait_for_ready=True)
        return last.done

    def list(self) -> weightsync_pb2.ListVersionsResponse:
        return self.stub.ListVersions(weightsync_pb2.ListVersionsRequest(), timeout=DEADLINE_S, wait_for_ready=True)

    def states(self) -> dict[int, str]:
        """State of every version, by number."""
        return {
            v.version.version: weightsync_pb2.VersionState.Name(v.state).removeprefix("VERSION_STATE_")
            for v in self.list().versions
        }

    def wait_until(self, accept: Callable[[weightsync_pb2.ListVersionsResponse], bool], what: str) -> None:
        """Poll the service's state."""
        end = time.monotonic() + DEADLINE_S
        while not accept(answer := self.list()):
            assert time.monotonic() < end, f"waited {DEADLINE_S:g} s for {what}; state is {answer}"
            time.sleep(0.02)


class Engine(Lines):
    """An engine that follows the service."""

    def __init__(
        self, service: Service, engine_id: str, *options: str, job: str = JOB, wrapper: Sequence[str] = ()
    ) -> None:
        script = pathlib.Path(__file__).with_name("weight_engine.py")
        words = ["--address", service.address, "--job", job, "--engine-id", engine_id, *options]
        super().__init__([str(script), *words], wrapper)
        self.engine_id = engine_id

    def wait_for_state(self, state: str, version: int | None) -> dict[str, Any]:
        """The next time it says that it is in this state at this version."""

        def accept(line: str) -> bool:
            said = json.loads(line)
            return said.get("state") == state and said.get("version") == version

        answer: dict[str, Any] = json.loads(self.wait_for(accept, f"{state} at {version}"))
        return answer

    def digest(self) -> dict[str, str]:
        self.send("digest")
        answer: dict[str, str] = json.loads(self.wait_for(lambda line: "digest" in line, "digest"))["digest"]
        return answer


def digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What an engine that serves these tensors answers to `digest`."""
    return {
        name: checksum(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hex()
        for name, tensor in tensors.items()
    }
