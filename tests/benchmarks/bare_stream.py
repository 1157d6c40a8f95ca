"""A floor: streams of bytes in chunks of 1 MiB over gRPC, with nothing around them.

`python -m benchmarks.bare_stream BYTES` serves them, prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

CHUNK = 1 << 20
UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Handler(grpc.GenericRpcHandler):
    """Takes a stream into a buffer, or sends one from a buffer of `size` bytes."""

    def __init__(self, size: int) -> None:
        self._content = bytes(size)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if handler_call_details.method.endswith("Up"):
            return grpc.stream_unary_rpc_method_handler(self._up)
        return grpc.unary_stream_rpc_method_handler(self._down)

    async def _up(self, chunks: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        buffer, filled = bytearray(len(self._content)), 0
        async for chunk in chunks:
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return b"done"

    async def _down(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        for start in range(0, len(self._content), CHUNK):
            await context.write(self._content[start : start + CHUNK])


async def serve(size: int) -> None:
    """Serve until the standard input ends."""
    server = grpc.aio.server(options=UNBOUNDED)
    server.add_generic_rpc_handlers((Handler(size),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class BareStream:
    """A client of `serve`."""

    def __init__(self, channel: grpc.Channel, size: int) -> None:
        self._content = memoryview(bytes(size))
        self._up, self._down = channel.stream_unary("/bare.Bare/Up"), channel.unary_stream("/bare.Bare/Down")

    def up(self) -> None:
        """Send everything."""
        self._up(bytes(self._content[start : start + CHUNK]) for start in range(0, len(self._content), CHUNK))

    def down(self) -> None:
        """Fetch everything."""
        buffer, filled = bytearray(len(self._content)), 0
        for chunk in self._down(b""):
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)


@contextmanager
def bare_stream(size: int) -> Iterator[BareStream]:
    """One of `size` bytes, its server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bare_stream", str(size)]
    folder = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=UNBOUNDED) as channel:
            yield BareStream(channel, size)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
