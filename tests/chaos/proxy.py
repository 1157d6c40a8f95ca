"""A TCP proxy between clients and the service, whose connections are cut on request."""

from __future__ import annotations

import asyncio
import threading

_PIECE = 1 << 16
_ARRIVES = 0.05
"""Seconds after which the server has certainly got what was passed on."""


class CuttingProxy:
    """Listens on a free loopback port and passes bytes on to `target`, "host:port". Runs in a thread of its own."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._to = (host, int(port))
        self._open: set[asyncio.StreamWriter] = set()
        self._armed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset every connection."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def cut_after_request(self) -> None:
        """Let the next bytes of a client reach the server, and reset that connection before anything comes back."""
        self._loop.call_soon_threadsafe(self._arm)

    def close(self) -> None:
        """Reset every connection, and end."""

        def end() -> None:
            self._server.close()
            self._reset_all()
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(end)
        self._thread.join(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    def _arm(self) -> None:
        self._armed = True

    def _reset_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, back}
        self._open |= pair
        mute = asyncio.Event()
        try:
            await asyncio.gather(self._requests(reader, back, mute), self._replies(there, writer, mute))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open -= pair
            for each in pair:
                each.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mute: asyncio.Event) -> None:
        while piece := await reader.read(_PIECE):
            # Short pieces are the protocol's own: acknowledgements, pings, window updates.
            fires = self._armed and len(piece) > 128
            if fires:
                self._armed = False
                mute.set()
            writer.write(piece)
            await writer.drain()
            if fires:
                await asyncio.sleep(_ARRIVES)
                break
        raise ConnectionResetError

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mute: asyncio.Event) -> None:
        while (piece := await reader.read(_PIECE)) and not mute.is_set():
            writer.write(piece)
            await writer.drain()
        if not mute.is_set():
            raise ConnectionResetError
