"""The connections of a load test, and what became of a call that failed. Knows grpc; nothing is sent twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from gradwire.attempts import Lost
from gradwire.channel import open_async_channel, translate
from gradwire.tls import TLS

CallFailed = grpc.aio.AioRpcError


class Connections:
    """`count` connections to one service, of the running event loop. Use it in an `async with`."""

    def __init__(self, target: str, *, count: int, token: str | None = None, tls: TLS | None = None) -> None:
        self._target = target
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._channels = [open_async_channel(target, tls) for _ in range(count)]

    def calls(self, path: str, timeout: float) -> list[Callable[[bytes], Awaitable[bytes]]]:
        """The method at `path` of each connection: request bytes -> reply bytes, or CallFailed."""
        return [self._bind(channel.unary_unary(path), timeout) for channel in self._channels]

    def _bind(self, method: Any, timeout: float) -> Callable[[bytes], Awaitable[bytes]]:
        return lambda body: method(body, timeout=timeout, metadata=self._metadata)

    def reason(self, failure: CallFailed) -> str:
        """Why a call failed, in the word that the service's errors have for it, or the SDK's where it gave none."""
        error = translate(failure, self._target, None, closed=False)
        return error.error.reason if isinstance(error, Lost) else error.reason

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()
