"""What `connect` and `launch` take, checked before anything is dialled or started."""

from __future__ import annotations

import re
from typing import Any

from gradwire.arguments import as_text, is_finite_number, wrong_type
from gradwire.tls import TLS
from gradwire_proto.errors import InvalidArgument

_WITH_PORT = re.compile(r"(?P<host>.*):(?P<port>[+-]?[0-9]+)\s*", re.DOTALL)
_TOKEN = re.compile(r"[\x20-\x7e]*")
_LONGEST = 1e9
"""Seconds, 31 years. grpc takes deadlines that are farther away for ones that have passed."""


def check_target(target: Any) -> str:
    """`target`, whose port, if it names one, must exist: grpc would dial another one, modulo 65536."""
    as_text(target, "target")
    match = _WITH_PORT.fullmatch(target)
    # Without brackets, the last number of an IPv6 address is no port.
    if match is None or target.startswith("unix:") or _is_bare_ipv6(match["host"]):
        return target
    port = match["port"]
    if not port.isdigit() or len(port.lstrip("0")) > 5 or not 1 <= int(port) <= 65535:
        message = f'expected "host:port" with a port from 1 to 65535, got {target!r:.100}'
        raise InvalidArgument(message, field="target", reason="TARGET_INVALID")
    return target


def check_token(token: Any) -> str | None:
    """`token`, which must be text that a header can hold. The error does not show it."""
    if token is None:
        return None
    if not isinstance(token, str):
        message = f"expected a str, got a {type(token).__qualname__}"
        raise InvalidArgument(message, field="token", reason="ARGUMENT_TYPE_INVALID")
    if not _TOKEN.fullmatch(token):
        message = "expected printable ASCII characters alone; a line break at the end of a file is none"
        raise InvalidArgument(message, field="token", reason="TOKEN_INVALID")
    return token


def as_tls(tls: Any) -> TLS | None:
    """The TLS that `tls` stands for: True is the system's certificates, None or False plain text."""
    if tls is None or isinstance(tls, bool):
        return TLS() if tls else None
    if isinstance(tls, TLS):
        return tls
    raise wrong_type(tls, "tls", "None, True or gradwire.TLS(ca=...)")


def check_timeout(timeout: Any, field: str = "timeout") -> float:
    """`timeout`, which must be a number of seconds above 0."""
    if is_finite_number(timeout) and 0 < timeout <= _LONGEST:
        return float(timeout)
    message = f"must be a number of seconds above 0 and at most {_LONGEST:g}, got {timeout!r:.80}"
    raise InvalidArgument(message, field=field, reason="TIMEOUT_INVALID")


def _is_bare_ipv6(host: str) -> bool:
    return ":" in host and "/" not in host and not host.endswith("]")
