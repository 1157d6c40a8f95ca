"""`gradwire load-test` on a real service, and k6 beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gradwire
from gradwire import optim
from gradwire.cli import app

SCRIPT = Path(__file__).parent.parent / "load" / "k6_gradients.js"
K6 = Path(sys.executable).parent / "k6"
QUICK = ("--warm-up=0.1", "--window=0.2", "--max-windows=3", "--layers=8,16,4", "--batch=16")


@pytest.fixture
def load_test(service: str, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command and returns the levels that it wrote."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "result.json"
        given = ["load-test", "--target", service, f"--json={path}", *QUICK, *arguments]
        outcome = CliRunner().invoke(app, given)
        assert outcome.exit_code == 0, outcome.output
        return json.loads(path.read_text())["levels"]

    return run


def test_gradients_of_several_models_and_clients_are_measured_and_nothing_is_left(
    client: gradwire.Client, load_test
) -> None:
    before = [model.id for model in client.list_models()]
    one, four = load_test("--concurrency=1,4", "--models=2", "--clients=2", "--floor")
    for level in (one, four):
        assert level["errors"] == 0 and level["requests"] > 5
        assert min(level[f"{part}_ms"] for part in ("queue", "transfer", "compute", "all_reduce")) > 0
        parts = ("queue", "transfer", "compute", "all_reduce", "optimizer", "recovery", "other", "outside")
        # More than all where the slowest rank in the one was not the slowest in the other.
        assert 0.99 <= sum(level[f"{part}_ms"] for part in parts) / level["mean_ms"] <= 1.5
        assert 0 < level["ratio"] < 1
    assert [model.id for model in client.list_models()] == before


def test_rate_of_train_steps_is_kept(load_test) -> None:
    (level,) = load_test("--rate=20", "--arrivals=poisson", "--method=train_step", "--workers=1", "--window=0.5")
    # Of Poisson arrivals in 1.5 s with this seed, so many as are due.
    assert level["errors"] == 0
    assert level["requests"] == pytest.approx(30, abs=15)
    assert level["optimizer_ms"] > 0


def test_model_that_exists_is_used_and_left_as_it_was(client: gradwire.Client, load_test) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    example = (torch.randn(5, 3), torch.randn(5, 4))
    model = client.create_model(net, loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=example, model_id="mine")
    before = model.state_dict()
    (level,) = load_test("--model=mine", "--concurrency=2", "--method=forward")
    assert level["errors"] == 0 and level["requests"] > 5
    (level,) = load_test("--model=models/mine", "--concurrency=2")
    assert level["errors"] == 0 and level["requests"] > 5
    assert model.info().step == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.skipif(not K6.exists(), reason="k6 comes for Linux on x86-64")
@pytest.mark.parametrize("load", ["CLIENTS=2", "RATE=10"])
def test_k6_gets_gradients_and_their_times_by_its_script(client: gradwire.Client, tmp_path: Path, load: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    example = (torch.randn(4, 3), torch.randint(0, 2, (4,)))
    model = client.create_model(net, loss="cross_entropy", example=example, workers=1)
    summary = tmp_path / "summary.json"
    settings = [f"TARGET={client.target}", f"MODEL={model.id}", "ROWS=6", "FEATURES=3", "CLASSES=2", "SECONDS=1"]
    given = [part for setting in (*settings, "P95=10000", load) for part in ("-e", setting)]
    command = [K6, "run", "--quiet", f"--summary-export={summary}", *given, SCRIPT]
    # It fails where a threshold of the script is not held.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["iterations"]["count"] >= 5
    assert metrics["checks"]["fails"] == 0 and "gradwire_errors" not in metrics
    assert metrics["gradwire_compute"]["avg"] > 0 and metrics["gradwire_queue"]["avg"] > 0
    model.delete()
