"""Tokens in their file: what is kept of them, and who may come with which."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwire_proto.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PermissionDenied
from gradwire_proto.token_file import TokenFile, id_in


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.json")


def test_file_recognises_a_token_and_does_not_hold_it(file: TokenFile) -> None:
    token, record = file.create("laptop", "alice", ["read"], 60.0)
    content = file.path.read_text()
    assert token not in content and token.rsplit("_", 1)[1] not in content
    assert file.read() == (record,)
    assert record.fits(token) and not record.fits(token[:-1]) and id_in(token) == record.id
    assert record.expires_at is not None and record.expires_at - record.created_at == pytest.approx(60.0)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert len({file.create(f"t{number}", "alice", ["read"])[0] for number in range(5)}) == 5


def test_state_of_a_token_follows_time_and_revocation(file: TokenFile) -> None:
    _, record = file.create("short", "alice", ["train"], 60.0)
    now = time.time()
    assert record.state(now) == "valid" and record.state(now + 61) == "expired"
    assert [each.id for each in file.revoke("short")] == [record.id]
    assert file.read()[0].state(now) == "revoked"
    assert file.revoke(record.id) == []
    # The name is free again.
    file.create("short", "alice", ["train"])
    assert [each.state(now) for each in file.read()] == ["revoked", "valid"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": "Not a name"}, "name"),
        ({"name": ""}, "name"),
        ({"owner": "../up"}, "owner"),
        ({"owner": "a" * 64}, "owner"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["write"]}, "scopes"),
        ({"lifetime": 0.0}, "expires"),
        ({"lifetime": float("nan")}, "expires"),
        ({"lifetime": 1e12}, "expires"),
    ],
)
def test_what_is_wrong_with_a_token_is_named_and_nothing_is_written(file: TokenFile, given: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        file.create(**{"name": "n", "owner": "o", "scopes": ["read"], **given})
    assert caught.value.field == field
    assert not file.path.exists()


def test_valid_name_cannot_be_given_twice_nor_an_unknown_one_be_revoked(file: TokenFile) -> None:
    file.create("one", "alice", ["read"])
    with pytest.raises(AlreadyExists):
        file.create("one", "bob", ["read"])
    with pytest.raises(InvalidArgument) as caught:
        file.revoke("two")
    assert caught.value.reason == "TOKEN_UNKNOWN"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "tokens": []}',
        b'{"version": 1, "tokens": {}, "x": 1}'.replace(b"{}", b"3"),
        b'{"version": 1, "tokens": [{"id": "x"}]}',
        b"\xff",
    ],
)
def test_file_that_is_none_of_tokens_is_left_alone_and_says_so(file: TokenFile, content: bytes) -> None:
    file.path.write_bytes(content)
    for use in (file.read, lambda: file.create("a", "b", ["read"]), lambda: file.revoke("a")):
        with pytest.raises(FailedPrecondition) as caught:
            use()
        assert caught.value.reason == "TOKENS_UNREADABLE" and str(file.path) in str(caught.value)
    assert file.path.read_bytes() == content


def test_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "none" / "tokens.json")
    with pytest.raises(PermissionDenied):
        file.create("a", "b", ["read"])
    with pytest.raises(FailedPrecondition):
        file.read()


def test_tokens_that_are_made_at_the_same_time_are_all_there(file: TokenFile) -> None:
    code = (
        "import sys; from pathlib import Path; from gradwire_proto.token_file import TokenFile; "
        "[TokenFile(Path(sys.argv[1])).create(f'{sys.argv[2]}-{n}', 'o', ['read']) for n in range(10)]"
    )
    makers = [subprocess.Popen([sys.executable, "-c", code, str(file.path), str(maker)]) for maker in range(3)]
    assert [maker.wait(timeout=60) for maker in makers] == [0, 0, 0]
    assert len(file.read()) == 30
    assert json.loads(file.path.read_text())["version"] == 1
