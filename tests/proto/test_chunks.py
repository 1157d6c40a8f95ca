"""Messages with one chunk of bytes are protobuf's, made and read by hand."""

from __future__ import annotations

import pytest

from gradwire_proto.chunks import ChunkFormat
from gradwire_proto.v1 import gradient_service_pb2 as pb

KINDS = [pb.UploadTensorsRequest, pb.DownloadTensorsResponse]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, (1 << 21) + 5])
def test_message_is_what_protobuf_makes_and_is_read_as_it_stands(kind, size):
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    form = ChunkFormat(kind)
    message = form.message([content[:7], memoryview(content)[7:]], size)
    assert message == kind(chunk=content).SerializeToString()
    chunk = form.chunk(message)
    assert chunk is not None and chunk == content


@pytest.mark.parametrize("kind", KINDS)
def test_message_of_another_form_is_left_to_protobuf(kind):
    form = ChunkFormat(kind)
    whole = kind(chunk=b"abc" * 100).SerializeToString()
    manifest = pb.UploadTensorsRequest(manifest=pb.UploadManifest(upload_id="a")).SerializeToString()
    for message in (
        b"",
        whole[:1],
        whole[:2],
        whole[:-1],
        whole + b"\x00",
        whole + whole,
        b"\xff" + whole,
        whole[:1] + b"\xff" * 12,
    ):
        assert form.chunk(message) is None
    assert ChunkFormat(pb.UploadTensorsRequest).chunk(manifest) is None
