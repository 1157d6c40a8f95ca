"""A frontend behind a locked door, and callers with and without keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_authority, make_certificate
from server.conftest import Frontend

from gradwire_proto.token_file import TokenFile
from gradwire_server.doors import token_book


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca, server and client (of this authority) as .pem and .key."""
    folder = tmp_path_factory.mktemp("certificates")
    make_authority(folder)
    for name in ("server", "client"):
        make_certificate(folder, name)
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """The service's file of tokens: empty."""
    (tmp_path / "tokens.json").write_text('{"version": 1, "tokens": []}')
    return TokenFile(tmp_path / "tokens.json")


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service looks at its file of tokens with each call."""
    monkeypatch.setattr(token_book, "LOOK_SECONDS", 0.0)


class Locked(Frontend):
    """A frontend that wants TLS and tokens."""

    def __init__(self, frontend: Frontend, channel: grpc.aio.Channel) -> None:
        super().__init__(frontend.service, frontend.cluster, channel, frontend.target, frontend.folder)

    def __call__(self, token: str) -> Frontend:
        """Who brings this token."""
        return Caller(self, token)


class Caller(Frontend):
    """A frontend as one caller sees it."""

    def __init__(self, frontend: Frontend, token: str) -> None:
        metadata = (("authorization", f"Bearer {token}"),)
        super().__init__(frontend.service, frontend.cluster, frontend.channel, frontend.target, frontend.folder)
        self.stub = _WithMetadata(self.stub, metadata)


class _WithMetadata:
    def __init__(self, stub: Any, metadata: Any) -> None:
        self._stub, self._metadata = stub, metadata

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)
        return lambda request, **how: method(request, metadata=(*self._metadata, *how.pop("metadata", ())), **how)


@pytest.fixture
def locked(start: Any, certificates: Path, tokens: TokenFile, looks_at_once: None) -> Callable[..., Any]:
    """`async with locked() as frontend`: `frontend(token)` calls with that token."""

    @asynccontextmanager
    async def running(**settings: Any) -> AsyncIterator[Locked]:
        tls = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
        async with start(**{**tls, "tokens": tokens.path, **settings}) as frontend:
            trusted = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
            async with grpc.aio.secure_channel(frontend.target, trusted) as channel:
                yield Locked(frontend, channel)

    return running
