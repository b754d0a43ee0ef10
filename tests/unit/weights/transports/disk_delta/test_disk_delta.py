"""The disk_delta transport: both ends over one folder."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.bucketing import buckets
from miles.weights.dtypes import TORCH_DTYPE, wire_dtype
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transports.disk_delta.transport import DiskDeltaTransport

Tensors = dict[str, torch.Tensor]
XOR, OVERWRITE = weightsync_pb2.DELTA_ENCODING_XOR, weightsync_pb2.DELTA_ENCODING_OVERWRITE


class Storage:
    """What the service does: name folders, and say which base to use."""

    def __init__(self, root: pathlib.Path, encoding: weightsync_pb2.DeltaEncoding.ValueType = XOR) -> None:
        self.root = root
        self.encoding = encoding
        self.sent: list[tuple[weightsync_pb2.TransportHandle, policy_pb2.Manifest]] = []
        self.written: list[int] = []

    def send(
        self, tensors: Tensors, senders: list[DiskDeltaTransport], base: int | None = None, bucket_bytes: int = 1 << 20
    ) -> tuple[weightsync_pb2.TransportHandle, policy_pb2.Manifest]:
        """Buckets go round the senders, as those of several ranks do; `base` is the position of an earlier send."""
        number = len(self.sent)
        handle = weightsync_pb2.TransportHandle(
            kind=weightsync_pb2.TRANSPORT_KIND_DISK_DELTA,
            publication_id=number + 1,
            disk_delta=weightsync_pb2.DiskDeltaHandle(
                path=str(self.root / f"weight_v{number:06d}"),
                partial_path=str(self.root / f".partial-{number}"),
                encoding=self.encoding,
            ),
        )
        if base is not None:
            handle.disk_delta.base_path = self.sent[base][0].disk_delta.path
            handle.disk_delta.base_publication_id = self.sent[base][0].publication_id
        descriptors, total = manifests.plan((n, wire_dtype(t.dtype), tuple(t.shape)) for n, t in tensors.items())
        written = 0
        for turn, bucket in enumerate(buckets(descriptors, bucket_bytes)):
            part = [(d.name, tensors[d.name]) for d in bucket]
            written += senders[turn % len(senders)].send(handle, bucket, part).written_bytes
        version = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=number)
        manifest = manifests.build(version, descriptors, total, number)
        senders[0].seal(handle, manifest)
        self.sent.append((handle, manifest))
        self.written.append(written)
        return handle, manifest


def weights(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    embedding = torch.randn(300, 16, generator=random)
    return {
        "embed": embedding,
        "head": embedding,
        "norm": torch.randn(33, generator=random).bfloat16(),
        "experts": torch.randn(8, 32, 16, generator=random).bfloat16(),
        "scale": torch.tensor(float(seed)),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, bool(seed % 2)]),
        "fp8": torch.randn(5, 5, generator=random).to(torch.float8_e4m3fn),
    }


def nudge(tensors: Tensors, seed: int) -> Tensors:
    """A few values of some tensors changed."""
    random = torch.Generator().manual_seed(seed)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("embed", "experts"):
        flat = changed[name].view(-1)
        flat[torch.randint(0, flat.numel(), (20,), generator=random)] += 0.5
    return changed


def same(received: Tensors, wanted: Tensors) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return received.keys() == wanted.keys() and all(
        received[n].dtype == t.dtype and received[n].shape == t.shape and raw(received[n]) == raw(t)
        for n, t in wanted.items()
    )


@pytest.mark.parametrize("encoding", [XOR, OVERWRITE])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_version_arrives_bit_for_bit_by_changes_and_from_scratch(
    tmp_path: pathlib.Path, encoding: weightsync_pb2.DeltaEncoding.ValueType, ranks: int
) -> None:
    storage, senders = Storage(tmp_path, encoding), [DiskDeltaTransport() for _ in range(ranks)]
    follower = DiskDeltaTransport()
    tensors = weights(0)
    for version in range(4):
        handle, manifest = storage.send(tensors, senders, base=version - 1 if version else None, bucket_bytes=4096)
        assert same(dict(follower.receive(handle, manifest).tensors), tensors)
        assert same(dict(DiskDeltaTransport().receive(handle, manifest).tensors), tensors), "the chain from the start"
        assert manifest.base_version == max(0, version - 1)
        assert manifest.HasField("base_version") == bool(version)
        tensors = nudge(tensors, version)
    assert max(storage.written[1:]) < storage.written[0], "changes are smaller than the whole"


def test_a_full_version_is_an_ordinary_safetensors_checkpoint(tmp_path: pathlib.Path) -> None:
    handle, _ = Storage(tmp_path).send(weights(0), [DiskDeltaTransport()])
    (file,) = pathlib.Path(handle.disk_delta.path).glob("*.safetensors")
    assert same(load_file(file), weights(0))


def test_a_version_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    sender = DiskDeltaTransport()
    storage = Storage(tmp_path)
    handle, manifest = storage.send(weights(0), [sender])
    assert not pathlib.Path(handle.disk_delta.partial_path).exists()
    files = {path.name for path in pathlib.Path(handle.disk_delta.path).iterdir()}
    assert files == {"index.json", "part-000000000000.safetensors"}
    manifest.tensors.add(name="more", dtype=wire_dtype(torch.uint8), checksum=bytes(16))
    incomplete = weightsync_pb2.TransportHandle()
    incomplete.CopyFrom(handle)
    shutil.copytree(handle.disk_delta.path, handle.disk_delta.partial_path)
    incomplete.disk_delta.path += "-other"
    with pytest.raises(ManifestError, match="missing or different: more"):
        sender.seal(incomplete, manifest)
    assert not pathlib.Path(incomplete.disk_delta.path).exists()
    sender.discard(incomplete)
    assert not pathlib.Path(handle.disk_delta.partial_path).exists()


def test_a_sender_without_the_base_writes_everything(tmp_path: pathlib.Path) -> None:
    storage = Storage(tmp_path)
    storage.send(weights(0), [DiskDeltaTransport()])
    restarted = DiskDeltaTransport()
    handle, manifest = storage.send(nudge(weights(0), 1), [restarted], base=0)
    assert not handle.disk_delta.base_path
    assert not manifest.HasField("base_version")
    shutil.rmtree(storage.sent[0][0].disk_delta.path)
    assert same(dict(DiskDeltaTransport().receive(handle, manifest).tensors), nudge(weights(0), 1))


def test_tensors_that_come_go_or_change_shape_are_written_whole(tmp_path: pathlib.Path) -> None:
    storage, sender, follower = Storage(tmp_path), DiskDeltaTransport(), DiskDeltaTransport()
    follower.receive(*storage.send({"a": torch.zeros(4096), "b": torch.ones(3), "c": torch.ones(9)}, [sender]))
    later = {"a": torch.zeros(4096), "c": torch.ones(4), "d": torch.arange(5)}
    later["a"][7] = 1
    handle, manifest = storage.send(later, [sender], base=0)
    for receiver in (follower, DiskDeltaTransport()):
        assert same(dict(receiver.receive(handle, manifest).tensors), later)


def test_a_receiver_whose_bytes_were_written_to_starts_over_from_the_last_full_version(tmp_path: pathlib.Path) -> None:
    storage, sender, follower = Storage(tmp_path), DiskDeltaTransport(), DiskDeltaTransport()
    tensors = weights(0)
    received = follower.receive(*storage.send(tensors, [sender]))
    received.tensors["experts"].view(-1)[0] = 77.0
    assert same(dict(follower.receive(*storage.send(nudge(tensors, 1), [sender], base=0)).tensors), nudge(tensors, 1))


def two_versions(root: pathlib.Path) -> tuple[Storage, DiskDeltaTransport, pathlib.Path]:
    """A full version that a receiver has, and a change to it; the change's folder."""
    storage, sender, follower = Storage(root), DiskDeltaTransport(), DiskDeltaTransport()
    follower.receive(*storage.send(weights(0), [sender]))
    handle, _ = storage.send(nudge(weights(0), 1), [sender], base=0)
    return storage, follower, pathlib.Path(handle.disk_delta.path)


def test_a_truncated_change_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    storage, follower, folder = two_versions(tmp_path)
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 5)
    with pytest.raises(ManifestError, match=r"part-000000000000.safetensors has \d+ bytes instead of \d+"):
        follower.receive(*storage.sent[1])


def test_a_change_truncated_in_file_and_index_is_refused_too(tmp_path: pathlib.Path) -> None:
    storage, follower, folder = two_versions(tmp_path)
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(size := file.stat().st_size - 5)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"files": {file.name: size}}))
    with pytest.raises(ManifestError, match="is said to lie in bytes"):
        follower.receive(*storage.sent[1])


@pytest.mark.parametrize("full", [True, False])
def test_flipped_bits_in_a_file_are_noticed(tmp_path: pathlib.Path, full: bool) -> None:
    storage, follower, _ = two_versions(tmp_path)
    which = 0 if full else 1
    file = pathlib.Path(storage.sent[which][0].disk_delta.path) / "part-000000000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-20 if full else -200] ^= 4
    file.write_bytes(data)
    with pytest.raises(ManifestError if not full else ChecksumMismatch):
        (DiskDeltaTransport() if full else follower).receive(*storage.sent[which])


def test_a_change_to_another_base_than_the_folder_that_is_there_is_refused(tmp_path: pathlib.Path) -> None:
    storage, _, _ = two_versions(tmp_path)
    folder = pathlib.Path(storage.sent[0][0].disk_delta.path)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"checksum": "00" * 16}))
    with pytest.raises(ManifestError, match="is a change to publication 1 with manifest"):
        DiskDeltaTransport().receive(*storage.sent[1])


def test_a_missing_base_is_an_error_and_the_version_at_hand_stays_good(tmp_path: pathlib.Path) -> None:
    storage, follower, _ = two_versions(tmp_path)
    shutil.rmtree(storage.sent[0][0].disk_delta.path)
    with pytest.raises(FileNotFoundError):
        DiskDeltaTransport().receive(*storage.sent[1])
    assert same(dict(follower.receive(*storage.sent[1]).tensors), nudge(weights(0), 1)), "it has the base in memory"


def test_a_folder_of_another_timeline_is_refused(tmp_path: pathlib.Path) -> None:
    storage, _, _ = two_versions(tmp_path)
    handle = weightsync_pb2.TransportHandle()
    handle.CopyFrom(storage.sent[0][0])
    handle.publication_id = 9
    with pytest.raises(ManifestError, match=r"holds publication 1 .* wanted is 9"):
        DiskDeltaTransport().receive(handle, storage.sent[0][1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "base": 3}'])
def test_a_damaged_index_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    storage, follower, folder = two_versions(tmp_path)
    (folder / "index.json").write_text(text)
    with pytest.raises(ManifestError, match=r"index.json is damaged|another format"):
        follower.receive(*storage.sent[1])


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: pathlib.Path) -> None:
    storage, follower, folder = two_versions(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"files": {"../other": 1}}))
    with pytest.raises(ManifestError, match="not a file of its own folder"):
        follower.receive(*storage.sent[1])


def test_every_dtype_travels(tmp_path: pathlib.Path) -> None:
    tensors = {
        str(d): torch.arange(8, dtype=torch.uint8).view(torch.uint8).repeat(8).to(d) for d in TORCH_DTYPE.values()
    }
    assert same(
        dict(DiskDeltaTransport().receive(*Storage(tmp_path).send(tensors, [DiskDeltaTransport()])).tensors), tensors
    )
