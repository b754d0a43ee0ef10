"""The engine's side of adapter updates: merges received adapters into the engine's own base weights.

The base is the engine's own Hugging Face checkpoint. Its identity is compared with the one in the manifest, so every
version is complete by itself, also for an engine that joins late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.adapters import lora
from miles.weights.base import ReceivedWeights, WeightsRefused
from miles.weights.check import check_weight_update_equal
from miles.weights.manifest import ChecksumMismatch

Publish = Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


class AdaptedWeights:
    """A base with an adapter merged in; implements ReceivedWeights. The adapter's bytes are kept, for checks."""

    def __init__(self, merged: Mapping[str, torch.Tensor], adapter: ReceivedWeights) -> None:
        self._tensors = merged
        self._adapter = adapter

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every weight as the engine takes it; those without an adapter are the base's own."""
        return self._tensors

    @property
    def adapter(self) -> Mapping[str, torch.Tensor]:
        """The adapter's tensors by PEFT's names."""
        return self._adapter.tensors

    def release(self) -> bool:
        """Release the adapter; what the engine serves does not view its bytes."""
        self._tensors = {}
        return self._adapter.release()


class AdapterBase:
    """Merges adapters into one base, which is not changed. Not thread-safe."""

    def __init__(
        self, base: Mapping[str, torch.Tensor], device: torch.device, publish: Publish = lambda tensors: iter(tensors)
    ) -> None:
        """`base` is every weight in the module form, tied ones once, all in the dtype that is served, on the CPU.

        Merged weights are put on `device`, and `publish` converts them to the form in which the engine takes them:
        adapters are trained in the module form, and so named. Raises ValueError for weights of several dtypes. Hashes
        the base at once.
        """
        dtypes = {tensor.dtype for tensor in base.values()}
        dtypes = dtypes - {torch.float32} or dtypes  # a few tensors are in float32 whatever the type of the others
        if len(dtypes) != 1:
            raise ValueError(f"the base's weights are of {len(dtypes)} dtypes; read them as one")
        (self._dtype,) = dtypes
        self._device = device
        self._base = base
        self._publish = publish
        self._identity = lora.base_checksum(base.items(), self._dtype)
        self._unadapted: dict[str, torch.Tensor] = {}
        """Weights without an adapter, on the device, by name."""

    def merge(self, adapter: ReceivedWeights, manifest: policy_pb2.Manifest) -> AdaptedWeights:
        """Merge an adapter into the base: the full weights of a version.

        Raises WeightsRefused when the engine's base is not the trainer's, or the adapter does not fit it.
        """
        self._check_identity(manifest)
        base = self._base
        lora.check_fits(adapter.tensors, base, manifest.lora.rank)
        adapted = set(lora.adapted_weights(adapter.tensors))
        if not self._unadapted:
            self._unadapted = {name: t.to(self._device) for name, t in base.items() if name not in adapted}
        full = (
            (name, self._merged(name, adapter.tensors, manifest.lora) if name in adapted else self._on_device(name))
            for name in base
        )
        return AdaptedWeights(dict(self._publish(full)), adapter)

    def check(
        self, manifest: policy_pb2.Manifest, received: AdaptedWeights, served: Mapping[str, torch.Tensor]
    ) -> None:
        """Raise ChecksumMismatch unless `served` holds, bit for bit, the base with the manifest's adapter merged in.

        Base and adapter are hashed again, and merged again.
        """
        check_weight_update_equal(manifest, received.adapter)
        if lora.base_checksum(self._base.items(), self._dtype) != self._identity:
            raise ChecksumMismatch("the weights that adapters are merged into have changed in this process's memory")
        base = self._base
        adapted = set(lora.adapted_weights(received.adapter))
        full = (
            (name, self._merged(name, received.adapter, manifest.lora) if name in adapted else base[name])
            for name in base
        )
        faults = []
        for name, expected in self._publish(full):
            if name not in served:
                faults.append(f"{name} is not served")
            elif not _same_bytes(expected, served[name]):
                faults.append(f"{name} has other bytes")
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            where = manifests.describe(manifest.version)
            raise ChecksumMismatch(f"the engine does not hold {where}: {'; '.join(sorted(faults)[:3])}{more}")

    def _merged(self, name: str, adapter: Mapping[str, torch.Tensor], settings: policy_pb2.LoraAdapter) -> torch.Tensor:
        a_RI, b_OR = (adapter[part].to(self._device) for part in lora.adapter_names(name))
        return lora.merged(self._base[name].to(self._device), a_RI, b_OR, lora.scale_of(settings))

    def _on_device(self, name: str) -> torch.Tensor:
        return self._unadapted[name] if name in self._unadapted else self._base[name].to(self._device)

    def _check_identity(self, manifest: policy_pb2.Manifest) -> None:
        if self._identity != manifest.lora.base_checksum:
            raise WeightsRefused(
                f"{manifests.describe(manifest.version)} adapts weights {manifest.lora.base_checksum.hex()}, but this "
                f"engine's hf_checkpoint holds {self._identity.hex()}; give trainer and engines the same model"
            )


def _same_bytes(expected: torch.Tensor, served: torch.Tensor) -> bool:
    if expected.dtype != served.dtype or expected.shape != served.shape:
        return False
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, served))
    return torch.equal(left, right)
