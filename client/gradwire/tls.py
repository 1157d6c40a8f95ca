"""How a connection is encrypted and whom it trusts."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

from gradwire_proto.errors import InvalidArgument

Pem: TypeAlias = "bytes | str | os.PathLike[str]"
"""PEM bytes, or the path of a file that holds them."""


@dataclass(frozen=True, kw_only=True)
class TLS:
    """An encrypted connection.

    ca: the certificates to trust; None trusts the system's. certificate, key: what the client shows of itself (mutual
    TLS), both or neither. Each is PEM bytes or the path of a PEM file.

    Raises InvalidArgument where only one of `certificate` and `key` is given, or something that is no PEM.
    """

    ca: Pem | None = None
    certificate: Pem | None = None
    key: Pem | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            pem = getattr(self, field.name)
            if pem is not None and not isinstance(pem, (bytes, str, os.PathLike)):
                message = f"expected PEM bytes or the path of a file, got a {type(pem).__qualname__}"
                raise InvalidArgument(message, field=f"tls.{field.name}", reason="ARGUMENT_TYPE_INVALID")
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("certificate and key go together", field="tls", reason="TLS_INCOMPLETE")

    def __repr__(self) -> str:
        return f"TLS(ca={self.ca is not None}, certificate={self.certificate is not None})"  # never the key


def read_pem(pem: Pem | None, field: str) -> bytes | None:
    """The bytes of a PEM argument. Raises InvalidArgument where the file cannot be read."""
    if pem is None or isinstance(pem, bytes):
        return pem
    try:
        return Path(pem).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidArgument(f"cannot be read: {error}", field=field, reason="TLS_UNREADABLE") from None
