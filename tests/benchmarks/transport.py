"""How tensors travel: shared memory and gRPC beside local torch, and beside a bare gRPC stream, in turn, in one run.

Bars: all gradients of the medium network (784-1024-1024-10, 256 rows; 7.1 MiB) returned by each call, at most 1.10
times the local step through shared memory and 1.40 times through gRPC; 64 MiB of weights down and up, at least 2 GiB/s
through shared memory and 0.85 times the throughput of a bare stream through gRPC; 1 GiB of weights pulled while the
frontend's private memory rises by 64 MiB at most and this process's by 1.1 GiB.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import torch
from torch import nn

import gradwire
from gradwire import optim

CHUNK = 1 << 20
MIB = 1 << 20
UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Bare(grpc.GenericRpcHandler):
    """Streams of bytes with nothing around them: taken into a buffer, or sent from one."""

    def __init__(self, size: int) -> None:
        self._content = bytes(size)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if handler_call_details.method.endswith("Up"):
            return grpc.stream_unary_rpc_method_handler(self._up)
        return grpc.unary_stream_rpc_method_handler(self._down)

    async def _up(self, chunks, context) -> bytes:
        buffer, filled = bytearray(len(self._content)), 0
        async for chunk in chunks:
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return b"done"

    async def _down(self, request, context) -> None:
        for start in range(0, len(self._content), CHUNK):
            await context.write(self._content[start : start + CHUNK])


async def serve_bare(size: int) -> None:
    """Serve until the standard input ends."""
    server = grpc.aio.server(options=UNBOUNDED)
    server.add_generic_rpc_handlers((Bare(size),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class BareStream:
    """A client of `serve_bare` in a process of its own."""

    def __init__(self, size: int) -> None:
        self._content = memoryview(bytes(size))
        self._server = subprocess.Popen(
            [sys.executable, __file__, f"--serve={size}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        channel = grpc.insecure_channel(f"127.0.0.1:{int(self._server.stdout.readline())}", options=UNBOUNDED)
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

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def in_turn(rounds: int, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each call, made one after another in every round. The first three rounds warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for each in range(rounds + 3):
        for name, call in calls.items():
            begin = time.perf_counter()
            # Freed within the time, as a loop that goes on frees it.
            call()
            if each >= 3:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def medium(shared: gradwire.Client, streamed: gradwire.Client, rounds: int) -> None:
    """Gradients of every call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    x, y, loss = torch.randn(256, 784), torch.randint(0, 10, (256,)), nn.CrossEntropyLoss()
    model = shared.create_model(net, loss=loss, optimizer=optim.SGD(lr=1e-3), example=(x, y))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()

    far = streamed.get_model(model.id)
    taken = in_turn(
        rounds,
        {
            "local": step,
            "shared memory": lambda: model.compute_gradients(x, y),
            "gRPC": lambda: far.compute_gradients(x, y),
        },
    )
    local = taken.pop("local")
    for (name, seconds), bar in zip(taken.items(), (1.10, 1.40), strict=True):
        print(
            f"medium, all gradients returned, {name}: {seconds / local:.2f} local steps of {local * 1e3:.1f} ms"
            f" (bar: {bar:.2f})",
            flush=True,
        )
    model.delete()


class Weights(nn.Module):
    """Little to compute, a lot to carry."""

    def __init__(self, nbytes: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.parts = nn.ParameterList(
            nn.Parameter(torch.zeros(nbytes // parts // 4), requires_grad=False) for _ in range(parts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + sum(part[0] for part in self.parts)


def weights(client: gradwire.Client, nbytes: int) -> gradwire.Model:
    """A model of that size, which nothing keeps on a disk: what is measured is the way to the rank and back."""
    example = (torch.randn(2, 2), torch.randn(2, 1))
    return client.create_model(Weights(nbytes, 16), loss="mse_loss", example=example, durability="none")


def state_dict(shared: gradwire.Client, streamed: gradwire.Client, rounds: int) -> None:
    """64 MiB down and up."""
    size = 64 * MIB
    model = weights(shared, size)
    far, bare, values = streamed.get_model(model.id), BareStream(size), model.state_dict()
    taken = in_turn(
        rounds,
        {
            "bare down": bare.down,
            "bare up": bare.up,
            "gRPC down": lambda: far.state_dict(),
            "gRPC up": lambda: far.load_state_dict(values),
            "shared memory down": lambda: model.state_dict(),
            "shared memory up": lambda: model.load_state_dict(values),
        },
    )
    for way in ("bare", "gRPC", "shared memory"):
        down, up = taken[f"{way} down"], taken[f"{way} up"]
        both = (taken["bare down"] + taken["bare up"]) / (down + up)
        print(
            f"64 MiB down and up, {way}: {2 * size / (down + up) / (1 << 30):.2f} GiB/s (down {down * 1e3:.0f} ms, up"
            f" {up * 1e3:.0f} ms), {both:.2f} times the bare stream"
            + {"bare": "", "gRPC": " (bar: 0.85)", "shared memory": " (bar: 2 GiB/s)"}[way],
            flush=True,
        )
    bare.close()
    model.delete()


def private_memory(pid: int) -> int:
    """RssAnon of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def rise(pid: int, call: Callable[[], object]) -> int:
    """How many bytes a process's private memory rises while `call` runs, sampled every 10 ms."""
    start, peak, over = private_memory(pid), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, private_memory(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    call()
    over.set()
    thread.join()
    return max(peak, private_memory(pid)) - start


def pull(shared: gradwire.Client, streamed: gradwire.Client) -> None:
    """1 GiB of weights."""
    model = weights(shared, 1 << 30)
    words = {each.pid: each.cmdline() for each in psutil.Process().children(recursive=True)}
    (frontend,) = [pid for pid, each in words.items() if any(word.startswith("gradwire_server.main") for word in each)]
    for name, puller in (("shared memory", model), ("gRPC", streamed.get_model(model.id))):
        of_frontend = rise(frontend, puller.state_dict)
        own = rise(psutil.Process().pid, puller.state_dict)
        print(
            f"1 GiB pulled, {name}: the frontend's private memory rises by {of_frontend / MIB:.0f} MiB (bar: 64), this"
            f" process's by {own / MIB:.0f} MiB (bar: 1126)",
            flush=True,
        )
    model.delete()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return asyncio.run(serve_bare(options.serve))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with (
        gradwire.launch(workers=1, threads_per_rank=1, spare_ranks=1) as shared,
        gradwire.connect(shared.target, shared_memory=False) as streamed,
    ):
        # First: memory that a process keeps from other work would hide what this one takes.
        pull(shared, streamed)
        medium(shared, streamed, 2 * options.rounds)
        state_dict(shared, streamed, options.rounds)


if __name__ == "__main__":
    main()
