"""A frontend's end of a channel, to be stopped and woken. `python stopped_frontend.py ENDPOINT`.

Prints "answered" when the rank has answered; and again, some seconds after it was told to go on.
"""

from __future__ import annotations

import asyncio
import sys

import zmq

from gradwire_workers.rank_channel import RankChannel


async def main(endpoint: str) -> None:
    channel = RankChannel(zmq.Context(), endpoint, "rank-x")
    await channel.call("echo")
    print("answered", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    # What was missed meanwhile would be held against the rank by now.
    await asyncio.sleep(5)
    await channel.call("echo")
    print("answered", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
