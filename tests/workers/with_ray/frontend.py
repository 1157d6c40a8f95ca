"""A frontend to be killed: `python frontend.py ADDRESS NAMESPACE FOLDER MEMORY_FOLDER serve|abandon`.

serve: connects and keeps one rank warm. abandon: starts a rank and never connects to it. Prints the rank's process id.
"""

from __future__ import annotations

import asyncio
import sys
import time

from gradwire_workers.cluster import Cluster, ClusterConfig
from gradwire_workers.placement import Placement


async def serve(address: str, namespace: str, folder: str, memory_folder: str) -> None:
    config = ClusterConfig(
        address=address, namespace=namespace, folder=folder, memory_folder=memory_folder, workers=1, spare_ranks=1
    )
    cluster = await Cluster.connect(config)
    await cluster.warm()
    (process,) = await cluster._pool.take(1, "")
    print(process.process_id, flush=True)
    await asyncio.sleep(3600)


def abandon(address: str, namespace: str, folder: str, memory_folder: str) -> None:
    placement = Placement(address, namespace)
    placement.join()
    print(placement.start_rank("rank-orphan", folder, memory_folder, patience=120.0)["process_id"], flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    *where, what = sys.argv[1:]
    asyncio.run(serve(*where)) if what == "serve" else abandon(*where)
