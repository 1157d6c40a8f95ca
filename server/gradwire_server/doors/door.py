"""Where every call comes in: whose it is, what it may ask for, and which part of the service answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gradwire_proto.errors import GradwireError, PermissionDenied, Unauthenticated
from gradwire_proto.token_file import DEFAULT_OWNER, TokenRecord, check_name
from gradwire_server.doors.scopes import ADMIN, SCOPE_OF, holds, scope_of
from gradwire_server.doors.token_book import TokenBook

T = TypeVar("T", covariant=True)

_SCHEME = "bearer "

OWNER_KEY = "gradwire-owner"
"""Metadata by which an admin's call says for whom it is made."""


@dataclass(frozen=True, slots=True)
class Guest(Generic[T]):
    """One call that was let in. `place`: what answers it, which is its owner's alone."""

    place: T
    _record: TokenRecord | None = None
    _book: TokenBook | None = None

    def check(self) -> None:
        """Raises Unauthenticated where the token is not good any more: of calls that last."""
        if self._record is not None and self._book is not None:
            self._book.still_good(self._record)

    def check_scope(self, method: str, request: Any) -> None:
        """Raises PermissionDenied where this request needs more than its method."""
        if self._record is not None:
            _check_scope(self._record, method, scope_of(method, request))


class Door(Generic[T]):
    """place_of: what belongs to an owner. book: None lets everybody in, as the default owner."""

    def __init__(self, place_of: Callable[[str], T], book: TokenBook | None) -> None:
        self._place_of = place_of
        self._book = book
        self._everybody: Guest[T] | None = None

    @property
    def everybody(self) -> Guest[T] | None:
        """Where all may come in, whoever does."""
        if self._everybody is None and self._book is None:
            self._everybody = Guest(self._place_of(DEFAULT_OWNER))
        return self._everybody

    def admit(self, method: str, metadata: Callable[[], Any]) -> Guest[T]:
        """A call of `method` with this metadata. Raises Unauthenticated, PermissionDenied."""
        if (everybody := self._everybody or self.everybody) is not None:
            return everybody
        found = {"authorization": "", OWNER_KEY: ""}
        for key, value in metadata() or ():
            if key in found:
                if found[key] or not isinstance(value, str):
                    raise Unauthenticated(f"expected one {key} in the metadata", reason="TOKEN_INVALID")
                found[key] = value
        return self._admit(method, _token_in(found["authorization"]), found[OWNER_KEY])

    def admit_token(self, token: str) -> Guest[T]:
        """A connection of its own kind whose calls bring no metadata; `check_method` is to follow for each."""
        if (everybody := self.everybody) is not None:
            return everybody
        return self._admit(None, token, "")

    def _admit(self, method: str | None, token: str, owner: str) -> Guest[T]:
        assert self._book is not None
        if not token:
            message = "a token is needed: connect(..., token=), or `authorization: Bearer` in the metadata"
            raise Unauthenticated(message, reason="TOKEN_MISSING")
        record = self._book.find(token)
        if method is not None:
            _check_scope(record, method, SCOPE_OF[method])
        return Guest(self._place_of(_acting_for(record, owner)), record, self._book)

    def check_method(self, guest: Guest[T], method: str) -> None:
        """Whether a guest of `admit_token` may call it now."""
        if self._book is not None:
            assert guest._record is not None
            _check_scope(self._book.still_good(guest._record), method, SCOPE_OF.get(method, ADMIN))


def _token_in(authorization: str) -> str:
    if authorization and not authorization.lower().startswith(_SCHEME):
        raise Unauthenticated("expected authorization: Bearer TOKEN", reason="TOKEN_INVALID")
    return authorization[len(_SCHEME) :].strip()


def _acting_for(record: TokenRecord, owner: str) -> str:
    if not owner or owner == record.owner:
        return record.owner
    if not holds(record.scopes, ADMIN):
        raise PermissionDenied(f"only an admin's token may act for others ({OWNER_KEY})", reason="SCOPE_MISSING")
    try:
        return check_name(owner, OWNER_KEY)
    except GradwireError as error:
        raise PermissionDenied(error.message, field=OWNER_KEY, reason="OWNER_INVALID") from None


def _check_scope(record: TokenRecord, method: str, scope: str) -> None:
    if not holds(record.scopes, scope):
        has = ", ".join(sorted(record.scopes))
        raise PermissionDenied(
            f"{method} needs the scope {scope}; the token {record.name!r} has {has}", reason="SCOPE_MISSING"
        )
