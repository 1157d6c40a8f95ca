"""Everything that is asked of Ray: processes for ranks, and reservations of capacity for models.

All calls block (on Ray's servers, or on a process that starts), so the event loop makes them in threads. None is on
the path of a step.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gradwire_proto.errors import ResourceExhausted, Unavailable
from gradwire_workers.rank_actor import RankActor

_SECONDS_TO_APPEAR = 10.0

_SECONDS_TO_LISTEN = 5.0
"""How long a Ray that is just being started is waited for."""


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Capacity that one model holds. `gpu_ids`: for each rank, the GPUs it may see; empty on the CPU."""

    group: PlacementGroup
    gpu_ids: tuple[tuple[str, ...], ...]


class Placement:
    """One service's share of a Ray cluster. `namespace` keeps its ranks apart from everyone else's."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace

    def join(self) -> None:
        """Connects to the cluster at this address and no other. Unavailable where nothing listens there.

        What listens and is no Ray may keep it for ever.
        """
        self._wait_for_listener()
        try:
            # Called from a thread, so that Ray leaves the process's signal handlers alone; it warns about that.
            logging.getLogger("ray").setLevel(logging.ERROR)
            ray.init(
                address=self._address,
                namespace=self._namespace,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, TimeoutError, RayError) as error:
            raise self.no_answer(str(error)) from error

    def no_answer(self, why: str) -> Unavailable:
        """The error where Ray does not answer, with what to do."""
        return Unavailable(
            f"ray_address: Ray does not answer at {self._address} ({why}); expected the HOST:PORT that"
            " `ray start --head` prints, of a Ray that runs and can be reached from here",
            reason="RAY_UNAVAILABLE",
        )

    def _wait_for_listener(self) -> None:
        # Ray itself would try for ever.
        host, _, port = self._address.rpartition(":")
        deadline = time.monotonic() + _SECONDS_TO_LISTEN
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_LISTEN).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise self.no_answer(error.strerror or str(error)) from None
            time.sleep(0.2)

    def leave(self) -> None:
        """Disconnects. Reservations go with the connection."""
        ray.shutdown()

    def check(self) -> None:
        """Raises Unavailable where Ray has no node any more. Does not return while its head does not answer."""
        if not any(node["Alive"] for node in ray.nodes()):
            raise Unavailable(f"Ray at {self._address} has no node that is alive", reason="RAY_UNAVAILABLE")

    def totals(self) -> tuple[int, float]:
        """CPUs and GPUs of the cluster."""
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        # A node that has just come up shows its resources a moment later.
        while "CPU" not in (resources := ray.cluster_resources()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return int(resources.get("CPU", 0)), float(resources.get("GPU", 0))

    def kill_orphans(self) -> int:
        """Kills every rank that an earlier frontend left in the namespace. Returns how many there were."""
        names = list_named_actors()
        for name in names:
            self.kill(name)
        return len(names)

    def start_rank(self, name: str, folder: str, memory_folder: str, *, patience: float) -> dict[str, Any]:
        """Starts a rank's process and waits until it serves. Takes seconds where it has to import torch.

        Returns what `RankActor.serve` says. Unavailable when the process does not come up.
        """
        # No CPU is asked for: a rank waits for free, and models reserve their capacity when they are made.
        options = ray.remote(RankActor).options(
            name=name, namespace=self._namespace, lifetime="detached", num_cpus=0, max_restarts=0, max_task_retries=0
        )
        try:
            actor = options.remote(name, folder, memory_folder, patience)
            return ray.get(actor.serve.remote(), timeout=patience)  # type: ignore[attr-defined]
        except (RayError, TimeoutError) as error:
            self.kill(name)
            raise Unavailable(f"a rank did not start: {error}", reason="RANK_NOT_STARTED") from error

    def kill(self, name: str) -> None:
        """Kills a rank's process. Nothing happens if it is gone."""
        # A ValueError means that Ray knows no such actor any more.
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(name, namespace=self._namespace))

    def reserve(self, ranks: int, gpus_per_rank: float, *, timeout: float) -> Reservation:
        """Reserves a CPU and some GPUs for each rank. ResourceExhausted when Ray has no room for them in time."""
        bundle = {"CPU": 1.0} | ({"GPU": gpus_per_rank} if gpus_per_rank else {})
        try:
            group = placement_group([dict(bundle) for _ in range(ranks)], strategy="PACK")
        except RayError as error:
            raise _unavailable(error) from error
        try:
            if not group.wait(timeout):
                raise ResourceExhausted(
                    f"Ray found no room for {ranks} ranks with {bundle} each within {timeout:g} s",
                    reason="CLUSTER_BUSY",
                    field="model.workers",
                    retryable=True,
                )
            return Reservation(group=group, gpu_ids=_gpu_ids(group, ranks, gpus_per_rank) if gpus_per_rank else ())
        except BaseException as error:
            with contextlib.suppress(RayError):
                remove_placement_group(group)
            if isinstance(error, RayError):
                raise _unavailable(error) from error
            raise

    def free(self, reservation: Reservation) -> None:
        """Gives a reservation back."""
        remove_placement_group(reservation.group)


def _unavailable(error: RayError) -> Unavailable:
    return Unavailable(f"Ray could not reserve ranks: {error}", reason="RAY_UNAVAILABLE")


def _gpu_ids(group: PlacementGroup, ranks: int, gpus_per_rank: float) -> tuple[tuple[str, ...], ...]:
    """The GPUs of each bundle, as only a process inside the bundle can tell."""
    tasks = []
    for index in range(ranks):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        task = ray.remote(_visible_gpus).options(num_cpus=0, num_gpus=gpus_per_rank, scheduling_strategy=strategy)
        tasks.append(task.remote())
    return tuple(tuple(ids) for ids in ray.get(tasks, timeout=60))


def _visible_gpus() -> list[str]:
    return [str(gpu) for gpu in ray.get_gpu_ids()]
