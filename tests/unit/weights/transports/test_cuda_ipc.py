"""What the GPU memory transport sends; the transfers themselves are in tests/gpu."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.rpc.gen import weightsource_pb2, weightsync_pb2
from miles.weights.manifest import ManifestError
from miles.weights.transports.cuda_ipc.sharing import boot_id, decode_bucket, device_index, encode_bucket

sizes = st.integers(0, 2**48)
handles = st.binary(max_size=80)


@given(handles, sizes, sizes, handles, sizes, handles, st.booleans(), sizes, st.integers(0, 7))
def test_a_shared_storage_arrives_as_it_was_sent(
    memory: bytes,
    size: int,
    start: int,
    counter: bytes,
    counter_offset: int,
    event: bytes,
    must_wait: bool,
    offset: int,
    index: int,
) -> None:
    share = (index, memory, size, start, counter, counter_offset, event, must_wait)
    sent = encode_bucket(share, "GPU-1", offset, size).SerializeToString()
    received = weightsource_pb2.CudaIpcBucket.FromString(sent)
    assert (received.device_uuid, received.offset, received.nbytes) == ("GPU-1", offset, size)
    assert decode_bucket(received, 3) == (3, *share[1:])


def test_a_bucket_larger_than_its_storage_is_refused() -> None:
    bucket = encode_bucket((0, b"m", 64, 0, b"c", 0, b"e", False), "GPU-1", 0, 65)
    with pytest.raises(ManifestError, match="65 bytes cannot lie in a storage of 64"):
        decode_bucket(bucket, 0)


def test_a_gpu_that_is_not_visible_is_named() -> None:
    with pytest.raises(ManifestError, match=r"GPU-no-such.*CUDA_VISIBLE_DEVICES"):
        device_index("GPU-no-such")


def test_ranks_handles_merge_into_one() -> None:
    merged = weightsync_pb2.TransportHandle(kind=weightsync_pb2.TRANSPORT_KIND_CUDA_IPC, publication_id=7)
    for rank in range(2):
        mine = weightsync_pb2.TransportHandle(kind=merged.kind, publication_id=7)
        mine.cuda_ipc.boot_id = boot_id()
        mine.cuda_ipc.buckets.append(encode_bucket((0, b"m", 64, 0, b"c", 0, b"e", False), "GPU-1", 64 * rank, 64))
        merged.MergeFrom(mine)
    assert merged.publication_id == 7
    assert merged.cuda_ipc.boot_id == boot_id()
    assert [bucket.offset for bucket in merged.cuda_ipc.buckets] == [0, 64]
