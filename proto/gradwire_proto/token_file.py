"""Bearer tokens as they are kept in a file: never themselves, only what recognises them.

A token is "gw_", eight hex digits that name it, "_", and 256 random bits: too many to be guessed, so that a plain
SHA-256 of it keeps it secret. The file is JSON, {"version": 1, "tokens": [...]}, and is replaced as a whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradwire_proto.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PermissionDenied

SCOPES = ("read", "train", "admin")
"""What a token may allow; each holds those before it."""

DEFAULT_OWNER = "default"
"""To whom belongs what is made without tokens."""

_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TOKEN = re.compile(r"gw_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What the file knows of one token. Times are seconds since 1970; None: never.

    id: the digits that name it. name: for people. owner: whose models it reaches. digest: SHA-256 of the token, hex.
    """

    id: str
    name: str
    owner: str
    scopes: frozenset[str]
    digest: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def state(self, now: float) -> str:
        """ "valid", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"

    def fits(self, token: str) -> bool:
        """Whether it is of this token. Takes as long for any."""
        return hmac.compare_digest(self.digest, digest_of(token))


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def id_in(token: str) -> str | None:
    """The digits that name a token; None for what is none."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else None


def check_name(value: str, field: str) -> str:
    """A name of a token or an owner. Raises InvalidArgument NAME_INVALID."""
    if not _NAME.fullmatch(value):
        message = "expected up to 63 lower-case letters, digits, dots, hyphens and underscores, the first a letter or"
        raise InvalidArgument(f"{message} digit, got {value!r:.80}", field=field, reason="NAME_INVALID")
    return value


def check_scopes(values: Iterable[str], field: str) -> frozenset[str]:
    """Scopes, at least one. Raises InvalidArgument SCOPE_UNKNOWN."""
    scopes = frozenset(values)
    if not scopes or not scopes <= set(SCOPES):
        message = f"expected some of {', '.join(SCOPES)}, got {', '.join(sorted(scopes)) or 'none'}"
        raise InvalidArgument(message, field=field, reason="SCOPE_UNKNOWN")
    return scopes


class TokenFile:
    """The file at `path`. Those who change it wait for each other; who reads it sees all of a change or nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[TokenRecord, ...]:
        """Every token, in the order of making. Raises FailedPrecondition TOKENS_UNREADABLE, which says why."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        return self._decode(content)

    def create(
        self, name: str, owner: str, scopes: Iterable[str], lifetime: float | None = None
    ) -> tuple[str, TokenRecord]:
        """(a new token, what is kept of it). lifetime: seconds; None: it does not expire.

        The file is made where it is missing, for its owner alone. Raises InvalidArgument, AlreadyExists TOKEN_EXISTS
        where a valid token has that name, and what `read` raises.
        """
        check_name(name, "name")
        check_name(owner, "owner")
        chosen = check_scopes(scopes, "scopes")
        if lifetime is not None and not 0 < lifetime <= 100 * 365 * 86400:
            message = f"expected more than 0 seconds and at most 100 years, got {lifetime:g}"
            raise InvalidArgument(message, field="expires", reason="OUT_OF_RANGE")
        with self._changed(may_be_missing=True) as records:
            now = time.time()
            if any(each.name == name and each.state(now) == "valid" for each in records):
                raise AlreadyExists(f"there is a valid token {name!r} already", field="name", reason="TOKEN_EXISTS")
            taken = {each.id for each in records}
            number = next(made for made in iter(lambda: secrets.token_hex(4), "") if made not in taken)
            token = f"gw_{number}_{secrets.token_urlsafe(32)}"
            record = TokenRecord(
                id=number,
                name=name,
                owner=owner,
                scopes=chosen,
                digest=digest_of(token),
                created_at=now,
                expires_at=None if lifetime is None else now + lifetime,
            )
            records.append(record)
        return token, record

    def revoke(self, name: str) -> list[TokenRecord]:
        """End the tokens of that name, or id, for good. Returns those that were valid until now; InvalidArgument
        TOKEN_UNKNOWN where there never was one.
        """
        with self._changed() as records:
            now = time.time()
            found = [index for index, each in enumerate(records) if name in (each.name, each.id)]
            if not found:
                raise InvalidArgument(f"there is no token {name!r:.80}", field="name", reason="TOKEN_UNKNOWN")
            ended = [records[index] for index in found if records[index].revoked_at is None]
            for index in found:
                if records[index].revoked_at is None:
                    records[index] = replace(records[index], revoked_at=now)
        return ended

    @contextmanager
    def _changed(self, may_be_missing: bool = False) -> Iterator[list[TokenRecord]]:
        """Inside, the file's tokens, to be changed; they are written at the end."""
        beside = self.path.with_name(f".{self.path.name}.lock")
        try:
            lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = [] if may_be_missing and not self.path.exists() else list(self.read())
            yield records
            try:
                self._write(records)
            except OSError as error:
                raise self._unwritable(error) from None
        finally:
            os.close(lock)

    def _write(self, records: Sequence[TokenRecord]) -> None:
        words = {"version": _VERSION, "tokens": [_encode(each) for each in records]}
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        # As readable as before: the service may run as another user of the group.
        mode = self.path.stat().st_mode & 0o777 if self.path.exists() else 0o600
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(words, file, indent=1)
                file.write("\n")
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _decode(self, content: bytes) -> tuple[TokenRecord, ...]:
        try:
            words = json.loads(content)
            if words["version"] != _VERSION:
                raise self._unreadable(f"its version is {words['version']!r:.20}, and {_VERSION} is known here")
            records = tuple(map(_decode, words["tokens"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(f"it is no file of tokens ({type(error).__name__}: {error})") from None
        if len({each.id for each in records}) < len(records):
            raise self._unreadable("two tokens have the same id")
        return records

    def _unreadable(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(f"tokens cannot be read from {self.path}: {why}", reason="TOKENS_UNREADABLE")

    def _unwritable(self, error: OSError) -> PermissionDenied:
        why = error.strerror or str(error)
        return PermissionDenied(f"tokens cannot be written to {self.path}: {why}", reason="TOKENS_UNWRITABLE")


def _encode(record: TokenRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "owner": record.owner,
        "scopes": [scope for scope in SCOPES if scope in record.scopes],
        "sha256": record.digest,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def _decode(words: Any) -> TokenRecord:
    """Raises ValueError, KeyError or TypeError where these are no token."""
    digest, number = words["sha256"], words["id"]
    if not _DIGEST.fullmatch(digest) or not re.fullmatch(r"[0-9a-f]{8}", number):
        raise ValueError("an id or a sha256 is none")
    return TokenRecord(
        id=number,
        name=check_name(words["name"], "name"),
        owner=check_name(words["owner"], "owner"),
        scopes=check_scopes(words["scopes"], "scopes"),
        digest=digest,
        created_at=float(words["created_at"]),
        expires_at=_time(words.get("expires_at")),
        revoked_at=_time(words.get("revoked_at")),
    )


def _time(value: Any) -> float | None:
    return None if value is None else float(value)
