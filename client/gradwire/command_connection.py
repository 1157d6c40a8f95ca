"""What every command that asks a service takes on the command line: where it is, and what proves who asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gradwire.exit_codes import exit_codes
from gradwire.tls import TLS

_TIMEOUT = 10.0


def _options(
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="HOST:PORT", help="The service. Default: $GRADWIRE_TARGET, then localhost:50051."
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="GRADWIRE_TOKEN", show_envvar=True, help="What proves who asks.")
    ] = None,
    use_tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and trust the system's certificates.")] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="GRADWIRE_TLS_CA", help="Encrypt, and trust these certificates."),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate of the caller.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
) -> dict[str, Any]:
    """What `connect` takes."""
    tls = None
    if use_tls or tls_ca or tls_certificate or tls_key:
        tls = TLS(ca=tls_ca, certificate=tls_certificate, key=tls_key)
    return {"target": target, "token": token, "tls": tls}


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with these options in place of its parameter `client`, which it is given."""
    mine, theirs = inspect.signature(_options).parameters, inspect.signature(command).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in mine}
        with exit_codes():
            from gradwire.client import connect

            with connect(**_options(**options), timeout=_TIMEOUT) as client:
                command(client=client, **given)

    rest = [each for each in theirs.values() if each.name != "client"]
    hints = get_type_hints(_options, include_extras=True) | _hints(command)
    keywords = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[each.name])
        for each in (*rest, *mine.values())
    ]
    run.__signature__ = inspect.Signature(keywords)  # pyright: ignore[reportAttributeAccessIssue] - typer reads it
    run.__annotations__ = {each.name: each.annotation for each in keywords}
    return run


def _hints(command: Callable[..., None]) -> dict[str, Any]:
    # Its client is known to type checkers alone.
    names = {name: value for name, value in command.__annotations__.items() if name != "client"}
    return get_type_hints(type("Hints", (), {"__annotations__": names}), command.__globals__, include_extras=True)
