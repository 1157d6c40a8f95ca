"""A load test from the first level to the last: models made, loads put on one after another, models deleted."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwire.load_test.connections import Connections
from gradwire.load_test.echo import echo_server
from gradwire.load_test.generators import precise_loop
from gradwire.load_test.levels import Level, measure
from gradwire.load_test.options import Options
from gradwire.load_test.subjects import Subject, subjects
from gradwire.tls import TLS

if TYPE_CHECKING:
    from gradwire.client import Client


def run_sweep(
    client: Client,
    options: Options,
    *,
    token: str | None = None,
    tls: TLS | None = None,
    found: Callable[[Level], None],
    progress: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Test the client's service. found: told each level as soon as it is measured, so that Ctrl-C loses none.

    token, tls: what the client connected with. progress, warn: told in words what goes on, and what went wrong.
    """
    with ExitStack() as stack:
        progress("creating models" if not options.model_ids else "asking the models once")
        chosen = stack.enter_context(subjects(client, options, warn))
        floor = stack.enter_context(echo_server(chosen[0].reply)) if options.floor else None
        # The many objects of torch: looking through them takes the collector longer than a request takes.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        runner = stack.enter_context(asyncio.Runner(loop_factory=precise_loop))
        runner.run(_levels(client.target, floor, chosen, options, token, tls, found, progress))


async def _levels(
    target: str,
    floor: str | None,
    chosen: Sequence[Subject],
    options: Options,
    token: str | None,
    tls: TLS | None,
    found: Callable[[Level], None],
    progress: Callable[[str], None],
) -> None:
    requests = [subject.request for subject in chosen]
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(Connections(target, count=options.clients, token=token, tls=tls))
        bare = None
        if floor is not None:
            bare = await stack.enter_async_context(Connections(floor, count=options.clients, token=token))
        # Levels before `low` are within the limit, those from `high` on are beyond it.
        low, high = 0, len(options.loads)
        while low < high:
            place = (low + high) // 2 if options.search else low
            load = options.loads[place]
            level = await measure(load, service, requests, options, progress)
            if bare is not None:
                # Right after it: the machine is as busy with other things as it was.
                there = lambda text: progress(f"floor, {text}")  # noqa: E731
                level = replace(level, floor=await measure(load, bare, requests[:1], options, there))
            found(level)
            low, high = (low, place) if is_beyond(level, options) else (place + 1, high)


def is_beyond(level: Level, options: Options) -> bool:
    """Whether the latency is above its limit, or nothing was answered at all."""
    latency = level.measured.latency(options.percentile)
    return options.latency_limit is not None and (latency is None or latency / 1000 > options.latency_limit)
