"""A bare gRPC server, in a process of its own, that answers every request with the same bytes: what the wire costs.

Reads the reply's length (8 bytes, little-endian) and the reply from stdin, prints its port, and ends when stdin does:
with the process that started it, however that ends.
"""

from __future__ import annotations

import asyncio
import sys

import grpc


class _Echo(grpc.GenericRpcHandler):
    """Answers each unary method with `reply`, whatever it is asked."""

    def __init__(self, reply: bytes) -> None:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return reply

        self._handler = grpc.unary_unary_rpc_method_handler(answer)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handler


async def serve() -> None:
    """Serve until stdin ends."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_Echo(sys.stdin.buffer.read(size)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve())
