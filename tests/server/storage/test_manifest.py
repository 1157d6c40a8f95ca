"""The manifest: what comes back, and that no byte of it can be another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from server.storage.checkpoint_cases import saved_model

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.manifest import FILES, Manifest, StoredFile, decode_manifest, encode_manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.of(saved_model(tmp_path), {name: StoredFile(3, "ab" * 32) for name in FILES}, "")


def refusal(content: bytes) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as refused:
        decode_manifest(content, "best")
    return refused.value


def sealed(manifest: Manifest, **changes: Any) -> bytes:
    """What somebody writes who knows the format."""
    fields = json.loads(encode_manifest(manifest))["checkpoint"] | changes
    body = json.dumps({"checkpoint": fields})[1:].encode()
    digest = hashlib.sha256(body).hexdigest()
    return f'{{"format": "gradwire-checkpoint", "version": 1, "sha256": "{digest}",\n'.encode() + body


def test_manifest_comes_back_as_it_was(manifest):
    assert decode_manifest(encode_manifest(manifest), "best") == manifest
    assert decode_manifest(sealed(manifest), "best") == manifest


def test_manifest_is_json_that_names_format_version_and_what_wrote_it(manifest):
    fields = json.loads(encode_manifest(manifest))
    assert (fields["format"], fields["version"]) == ("gradwire-checkpoint", 1)
    assert {"gradwire", "torch", "step", "command", "model_id", "workers", "threads"} <= fields["checkpoint"].keys()


def test_checkpoint_has_the_bytes_of_all_files(manifest):
    assert manifest.checkpoint().nbytes == 3 * len(FILES)


def test_no_byte_of_a_manifest_can_be_another(manifest):
    whole = encode_manifest(manifest)
    for index in range(len(whole)):
        for flip in (1, 4, 32):
            changed = bytearray(whole)
            changed[index] ^= flip
            assert refusal(bytes(changed)).reason in ("CHECKPOINT_CORRUPT", "CHECKPOINT_VERSION")


def test_every_cut_of_a_manifest_is_refused(manifest):
    whole = encode_manifest(manifest)
    for end in range(len(whole)):
        error = refusal(whole[:end])
        assert error.reason == "CHECKPOINT_CORRUPT" and "manifest.json" in str(error)


def test_another_version_is_named(manifest):
    error = refusal(encode_manifest(manifest).replace(b'"version": 1', b'"version": 2', 1))
    assert error.reason == "CHECKPOINT_VERSION"
    assert "version 2" in str(error) and "version 1" in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"no JSON", b"[]", b"3", b"{}", b'{"format": "x", "version": 1}', b"\xff\xfe"]
)
def test_what_is_no_manifest_is_refused(content):
    assert refusal(content).reason == "CHECKPOINT_CORRUPT"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "3"},
        {"step": True},
        {"command": 1.0},
        {"name": None},
        {"tensors": [{}]},
        {"tensors": None},
        {"splits": {"train": {}}},
        {"files": {"../../etc/passwd": {"nbytes": 1, "sha256": ""}}},
        {"files": {"model.pb": {"nbytes": -1, "sha256": ""}}},
    ],
)
def test_field_that_is_wrong_is_refused_though_the_digest_is_right(manifest, changes):
    assert refusal(sealed(manifest, **changes)).reason == "CHECKPOINT_CORRUPT"
