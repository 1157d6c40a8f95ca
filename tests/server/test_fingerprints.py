"""What tells one request from another."""

from __future__ import annotations

import hashlib
import random

from gradwire_server.fingerprints import file_fingerprint, fingerprint, fits


def test_requests_that_differ_anywhere_have_other_fingerprints() -> None:
    raw = random.Random(0).randbytes(300)
    others = [raw[:each] + bytes([raw[each] ^ 1]) + raw[each + 1 :] for each in range(len(raw))]
    found = {fingerprint("TrainStep", each) for each in (raw, raw[:-1], raw + b"\0", *others)}
    found.add(fingerprint("ForwardBackward", raw))
    assert len(found) == len(raw) + 4


def test_request_that_an_older_version_stored_is_known_again() -> None:
    old = hashlib.sha256(b"TrainStep" + b"raw").digest()
    assert fits(old, fingerprint("TrainStep", b"raw"), "TrainStep", b"raw")
    assert not fits(old, fingerprint("TrainStep", b"other"), "TrainStep", b"other")


def test_empty_file_has_a_fingerprint(tmp_path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"x")
    assert file_fingerprint(tmp_path / "empty") != file_fingerprint(tmp_path / "full")
