"""The tokens that are good now: read from their file, and again when it changes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from gradwire_proto.errors import GradwireError, Unauthenticated
from gradwire_proto.token_file import TokenFile, TokenRecord, id_in
from gradwire_server.doors.file_marks import mark_of

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How long a token that was revoked may go on being good. One that was made is found at once."""


class TokenBook:
    """See the module. Where a changed file cannot be read, what was read before goes on being good."""

    def __init__(self, path: Path) -> None:
        """Raises FailedPrecondition TOKENS_UNREADABLE."""
        self._file = TokenFile(path)
        self._mark = mark_of(path)
        self._records = {each.id: each for each in self._file.read()}
        self._looked_at = time.monotonic()

    def find(self, token: str) -> TokenRecord:
        """What is known of a token. Raises Unauthenticated TOKEN_UNKNOWN, TOKEN_EXPIRED, TOKEN_REVOKED."""
        self._look()
        record = self._record(token)
        if record is None:
            # It may have been made just now.
            self._look(at_once=True)
            record = self._record(token)
        if record is None:
            raise Unauthenticated("the token is not known here", reason="TOKEN_UNKNOWN")
        return self._good(record)

    def _record(self, token: str) -> TokenRecord | None:
        record = self._records.get(id_in(token) or "")
        return record if record is not None and record.fits(token) else None

    def still_good(self, record: TokenRecord) -> TokenRecord:
        """The same as it is now, of one that was found. Raises as `find`."""
        self._look()
        known = self._records.get(record.id)
        if known is None or known.digest != record.digest:
            raise Unauthenticated("the token is not known here any more", reason="TOKEN_UNKNOWN")
        return self._good(known)

    def _good(self, record: TokenRecord) -> TokenRecord:
        state = record.state(time.time())
        if state != "valid":
            raise Unauthenticated(f"the token {record.name!r} is {state}", reason=f"TOKEN_{state.upper()}")
        return record

    def _look(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        mark = mark_of(self._file.path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._records = {each.id: each for each in self._file.read()}
            logger.info("the tokens were read again: %d", len(self._records))
        except GradwireError as error:
            logger.error("%s; those that were read before stay good", error)
