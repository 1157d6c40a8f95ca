"""A service whose Ray or storage is away says so and heals when it is back; one that is stopped saves what changed."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from chaos.service_processes import processes
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

import gradwire
from gradwire import optim
from gradwire.errors import Unavailable


class Health:
    """What the service's port answers."""

    def __init__(self, target: str) -> None:
        self._stub: Any = health_pb2_grpc.HealthStub(grpc.insecure_channel(target))

    def __call__(self, name: str) -> bool:
        answer = self._stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def until(self, name: str, serves: bool, seconds: float = 30.0) -> float:
        """Seconds until that service serves, or does not."""
        begin = time.monotonic()
        while self(name) != serves:
            assert time.monotonic() < begin + seconds, f"{name} is still {not serves}"
            time.sleep(0.1)
        return time.monotonic() - begin


def heads() -> set[psutil.Process]:
    """The processes that answer for the Rays of this process's services."""
    return {each for each in processes() if each.name().startswith("gcs_server")}


@pytest.mark.timeout(180)
def test_what_is_away_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    storage, away, others = tmp_path / "storage", tmp_path / "away", heads()
    with gradwire.launch(workers=1, spare_ranks=0, storage=storage) as client:
        health, x, y = Health(client.target), torch.ones(2, 3), torch.ones(2, 1)
        model = client.create_model(
            nn.Linear(3, 1), loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=(x, y), model_id="m"
        )
        assert all(map(health, ("", "live", "ready", "gradwire.v1.GradientService", "ray", "storage", "drain")))
        (ray,) = heads() - others
        ray.send_signal(signal.SIGSTOP)
        try:
            health.until("ready", False)
            assert (health("live"), health("ray"), health("storage")) == (True, False, True)
            # The ranks are there: Ray is asked for nothing in a step.
            assert [model.train_step(x, y).step for _ in range(3)] == [1, 2, 3]
        finally:
            ray.send_signal(signal.SIGCONT)
        health.until("ready", True)
        shutil.move(storage, away)
        try:
            health.until("storage", False)
            assert (health("ready"), health("ray"), health("live")) == (False, True, True)
        finally:
            shutil.move(away, storage)
        health.until("ready", True)
    assert {path.parent.name for path in storage.glob("checkpoints/**/m/*/manifest.json")} == {"0", "3"}


def test_a_wrong_address_of_ray_is_told_in_one_line() -> None:
    with pytest.raises(Unavailable, match=r"ray_address: Ray does not answer at 127\.0\.0\.1:1 \(Connection refused\)"):
        gradwire.launch(ray_address="127.0.0.1:1")
