"""One record's bytes: what went in comes out, and no other bytes do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_proto.values import SplitDecision
from gradwire_server.fingerprints import fingerprint
from gradwire_server.storage.records import (
    HEADER_BYTES,
    REPLY_BYTES,
    BadRecord,
    Entry,
    StoredTensor,
    StoredUpload,
    decode,
    decode_header,
    encode,
)

SEED = 12345
tensors = st.builds(
    StoredTensor,
    dtype=st.sampled_from(["float32", "int64"]),
    shape=st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple),
    offset=st.integers(0, 1 << 50),
    nbytes=st.integers(0, 1 << 50),
)
uploads = st.builds(
    StoredUpload, name=st.text(max_size=8), file=st.text(max_size=8), tensors=st.lists(tensors, max_size=2).map(tuple)
)
words = st.none() | st.text(max_size=12)
splits = st.builds(
    SplitDecision,
    whole=words,
    inputs_whole=st.booleans(),
    returns_loss=st.booleans(),
    loss=words,
    weight=words,
    written=st.none() | st.lists(st.text(max_size=8), max_size=2).map(tuple),
    own_statistics=st.booleans(),
)
entries = st.builds(
    Entry,
    number=st.integers(0, (1 << 64) - 1),
    method=st.text(max_size=12),
    request=st.binary(max_size=200),
    reply=st.none() | st.binary(max_size=200),
    request_id=st.none() | st.text(max_size=36),
    body=st.binary(max_size=32),
    commands=st.integers(1, 1 << 16),
    refused=st.none() | st.text(max_size=20),
    uploads=st.lists(uploads, max_size=2).map(tuple),
    released=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    splits=st.dictionaries(st.text(max_size=8), splits, max_size=2),
) | st.builds(
    Entry,
    number=st.integers(0, (1 << 64) - 1),
    method=st.text(max_size=12),
    request=st.just(b""),
    reply=st.none(),
    request_id=st.none() | st.text(max_size=36),
    body=st.binary(max_size=32),
    refused=st.text(max_size=20),
    unnumbered=st.just(True),
)


def joined(entry: Entry, seed: int = SEED) -> bytes:
    return b"".join(encode(entry, seed))


def read(record: bytes | bytearray, seed: int = SEED) -> Entry:
    header = decode_header(memoryview(record), seed)
    if header.nbytes != len(record):
        raise BadRecord("another length")
    return decode(header, memoryview(record), seed)


@given(entries)
def test_what_is_encoded_is_decoded_to_the_same(entry):
    assert read(joined(entry)) == entry


@pytest.mark.parametrize("by_fingerprint", [False, True])
def test_no_bit_of_a_record_can_be_flipped_unnoticed(entry, by_fingerprint):
    written = entry(7, 30)
    if by_fingerprint:
        written = replace(written, body=fingerprint(written.method, written.request), body_checks=True)
    record = bytearray(joined(written))
    for index in range(len(record)):
        for bit in range(8):
            record[index] ^= 1 << bit
            with pytest.raises(BadRecord):
                read(bytes(record))
            record[index] ^= 1 << bit
    assert read(bytes(record)) == written


def test_record_of_another_segment_is_none_of_this_one(entry):
    with pytest.raises(BadRecord):
        read(joined(entry(7)), SEED + 1)


def test_only_a_refused_command_may_have_no_number(entry, monkeypatch):
    monkeypatch.setattr("gradwire_server.storage.records._HAS_REPLY", 4)
    record = joined(entry(7))
    monkeypatch.undo()
    with pytest.raises(BadRecord, match="command 7"):
        read(record)


def test_empty_reply_is_not_a_missing_one(entry):
    assert read(joined(entry(1, reply=b""))).reply == b""
    assert read(joined(entry(1, reply=None))).reply is None


def test_reply_beyond_the_limit_is_left_out(entry):
    assert read(joined(entry(1, reply=bytes(REPLY_BYTES)))).reply == bytes(REPLY_BYTES)
    assert read(joined(entry(1, reply=bytes(REPLY_BYTES + 1)))).reply is None


def test_request_is_copied_neither_when_written_nor_when_read(entry):
    written = entry(1, 1000)
    assert any(part is written.request for part in encode(written, SEED))
    record = bytearray(joined(written))
    request = read(record).request
    assert isinstance(request, memoryview) and request.obj is record


def test_last_byte_is_never_zero_and_no_single_flip_makes_it_so(entry):
    last = joined(entry(1))[-1]
    assert last.bit_count() > 1
    assert len(joined(entry(1))) > HEADER_BYTES
