"""One rank's worker: it holds the job's backend and runs the commands on it, the same on every rank."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from miles.config import JobConfig
from miles.precision.of_run import rollout_recipe
from miles.services.trainer.backends.protocol import TrainerBackend
from miles.services.trainer.checkpoint.manager import WRITING, WRITTEN
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks import shared_folders
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError
from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.sample_exchange import SampleExchange
from miles.services.trainer.step.progress import Report
from miles.telemetry.tracing import traced
from miles.types import SampleGroup
from miles.weights.export_format import AS_TRAINED, ExportFormat, formatted_layout

if TYPE_CHECKING:
    from miles.rpc.gen import policy_pb2
    from miles.services.trainer.checkpoint.background_save import Saving
    from miles.weights.base import Endpoint
    from miles.weights.publisher import Layout, WeightSender


class RankWorker:
    """One rank's part of the service; `run` is called by one thread at a time."""

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        share: Callable[[bool], bool] = lambda flag: flag,
        exchange: SampleExchange | None = None,
    ) -> None:
        """`share` broadcasts rank 0's flag to every rank, `exchange` hands out its samples; None for a rank alone."""
        self.device = device
        self.rank = rank
        self._ranks = ranks
        self._share = share
        self._exchange = exchange
        self._backend: TrainerBackend | None = None
        self._sender: WeightSender | None = None
        """On ranks other than 0; rank 0 uses its publisher's."""
        self._saving: Saving | None = None
        """The checkpoint that is being written."""
        self._export_format: ExportFormat = AS_TRAINED
        self.loaded_from: pathlib.Path | None = None
        """Checkpoint that the job was loaded from; None for the initial weights."""
        self.notes: Sequence[str] = ()
        """What a person should know of how the job was loaded."""
        self.warnings: Sequence[str] = ()
        """What a person should know of the last training step."""
        self._restored_s = 0.0
        """Time that moving memory back to the device has taken since the last step, in seconds."""

    def run(
        self,
        command: Command,
        *,
        groups: Sequence[SampleGroup] | None = None,
        report: Report = lambda progress: None,
        abandonment: Abandonment | None = None,
        sender: WeightSender | None = None,
    ) -> Any:
        """Run a command; rank 0 also passes what cannot be broadcast.

        Returns the state (start), the metrics or, for an abandoned step, None (train), which engines' GPU memory it can
        open (open_gpu_memory), the report for `export.merge` (export), whether this rank's files of a checkpoint are
        written (save_progress), what was freed (release_memory), or which folder this rank misses (look_for_folders).
        """
        arguments = command.arguments
        match command.name:
            case shared_folders.LOOK:
                return shared_folders.look(command)
            case "start":
                return self._start(arguments["config"], pathlib.Path(arguments["checkpoint_dir"]))
            case "train":
                return self._train(arguments["step"], groups, report, abandonment or self.abandonment())
            case "open_gpu_memory":
                return self._open_gpu_memory(command.payloads)
            case "export":
                return self._export(command, sender)
            case "save":
                return self._at_hand().save(
                    pathlib.Path(arguments["directory"]), TrainerState.from_json(arguments["state"])
                )
            case "begin_save":
                state = TrainerState.from_json(arguments["state"])
                self._saving = self._at_hand().begin_save(pathlib.Path(arguments["directory"]), state)
                return None
            case "save_progress":
                return WRITTEN if self._saving is None or self._saving.done() else WRITING
            case "finish_save":
                saving, self._saving = self._saving, None
                return None if saving is None else saving.finish()
            case "save_hf":
                return self._at_hand().save_hf(pathlib.Path(arguments["directory"]))
            case "release_memory":
                return self._release_memory(state=arguments["state"])
            case "stop":
                return self._stop()
        raise ValueError(f"no command is called {command.name!r}")

    def abandonment(self) -> Abandonment:
        """Make the means to abandon one training step on all ranks."""
        return Abandonment(self._share)

    @traced("take step")
    def _train(
        self,
        step: int,
        groups: Sequence[SampleGroup] | None,
        report: Report,
        abandonment: Abandonment,
    ) -> Mapping[str, float] | None:
        backend, schedule = self._at_hand(), None
        if self._exchange is not None:
            groups, schedule = self._exchange.hand_out(groups, backend)
        assert groups is not None, "rank 0 passes the groups that it has collected"
        with contextlib.suppress(StepAbandonedError):
            metrics = backend.train(step, groups, report, abandonment, schedule)
            if self._restored_s:
                metrics = {**metrics, "perf/onload_train_time": self._restored_s}
            self._restored_s = 0.0
            self.warnings = backend.warnings
            return metrics
        return None

    def _start(self, config_json: dict[str, Any], checkpoint_dir: pathlib.Path) -> TrainerState:
        self._stop()
        config = JobConfig.from_flat(config_json)
        backend = create_backend(config, checkpoint_dir, self.device)
        try:
            state = backend.load()
        except BaseException:
            backend.close()
            raise
        self._backend, self.loaded_from, self.notes = backend, backend.loaded_from, tuple(backend.notes)
        self._export_format = _export_format(config)
        return state

    def endpoint(self, weightsync_address: str) -> Endpoint:
        """This rank as transports see it."""
        from miles.weights.base import Endpoint

        return Endpoint(weightsync_address, self.device, self.rank, self._ranks)

    def layout(self) -> Layout:
        """Name, dtype and shape of each tensor that will be sent."""
        return formatted_layout(self._export_format, self._loaded().export_layout())

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """Description of the adapter; None when full weights will be sent."""
        return self._loaded().lora

    @traced("send weights")
    def _export(self, command: Command, sender: WeightSender | None) -> bytes:
        from miles.services.trainer.export import send_share
        from miles.weights.publisher import WeightSender

        if sender is None:
            sender = self._sender = self._sender or WeightSender(self.endpoint(command.arguments["address"]))
        return send_share(self._at_hand(), sender, command, self.rank, self._ranks, self._export_format)

    def _open_gpu_memory(self, probes: Sequence[bytes]) -> bytes:
        from miles.rpc.gen import weightsource_pb2
        from miles.weights.transports.cuda_ipc.probe import open_probes

        engines = [weightsource_pb2.GpuMemoryProbe.FromString(probe) for probe in probes]
        return open_probes(engines, self.device, self.rank).SerializeToString()

    def _release_memory(self, *, state: bool) -> bytes:
        from miles.rpc.gen import trainer_pb2

        moved = self._loaded().release_memory(state=state)
        message = trainer_pb2.TrainerReleaseMemoryResponse(released_bytes=moved.nbytes, release_s=moved.seconds)
        return message.SerializeToString()

    def _stop(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = None
        if self._saving is not None:
            self._saving.wait()
        self._saving = None
        if self._backend is not None:
            self._backend.close()
        self._backend = self.loaded_from = None
        self._restored_s = 0.0

    def _at_hand(self) -> TrainerBackend:
        """The backend, with everything on its device."""
        backend = self._loaded()
        self._restored_s += backend.restore_memory().seconds
        return backend

    def _loaded(self) -> TrainerBackend:
        if self._backend is None:
            raise RuntimeError("no job is loaded; StartJob comes first")
        return self._backend


def _export_format(config: JobConfig) -> ExportFormat:
    recipe = rollout_recipe(config)
    if recipe is None:
        return AS_TRAINED
    from miles.precision.tensors import QuantisedTensors

    return QuantisedTensors(recipe)


def create_backend(config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> TrainerBackend:
    """The backend that the configuration names."""
    match config.train.train_backend:
        case "fsdp":
            from miles.services.trainer.backends.fsdp.backend import FsdpBackend

            return FsdpBackend(config, checkpoint_dir, device)
        case "megatron":
            from miles.services.trainer.backends.megatron.precision.choice import choose_scales

            choose_scales(config)
            from miles.services.trainer.backends.megatron.backend import MegatronBackend

            return MegatronBackend(config, checkpoint_dir, device)
    raise ValueError(f"train_backend {config.train.train_backend!r} is not one of: fsdp, megatron")
