"""`gradwire load-test` on a real service, and what k6 would send to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from torch import nn
from typer.testing import CliRunner

import gradwire
from gradwire import optim
from gradwire.cli import app
from gradwire_proto import codec
from gradwire_proto.tensors import to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb

SCRIPTS = Path(__file__).parent.parent / "load"
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


NODE = """
const { SERVICE, METHOD, gradientRequest } = await import(process.argv[1]);
const encode = (buffer) => Buffer.from(buffer).toString("base64");
const request = gradientRequest({ model: "for-k6", rows: 6, features: 3, classes: 2, encode });
console.log(JSON.stringify({ method: `${SERVICE}/${METHOD}`, request }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_request_of_the_k6_script_is_one_that_the_service_answers(client: gradwire.Client, tmp_path: Path) -> None:
    # Node takes a file for a module by its name; k6 takes .js for one.
    request = shutil.copy(SCRIPTS / "gradient_request.js", tmp_path / "gradient_request.mjs")
    script = shutil.copy(SCRIPTS / "k6_gradients.js", tmp_path / "k6_gradients.mjs")
    subprocess.run(["node", "--check", script], check=True, timeout=60)
    command = ["node", "--input-type=module", "--eval", NODE, f"file://{request}"]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    method = pb.DESCRIPTOR.services_by_name["GradientService"].methods_by_name["ComputeGradients"]
    assert made["method"] == f"{method.containing_service.full_name}/{method.name}"

    message = json_format.ParseDict(made["request"], pb.ComputeGradientsRequest())
    batch = codec.decode_batch(message.batch, "batch")
    inputs, targets = (to_torch(each) for each in (batch.inputs, batch.targets))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    example = (torch.randn(4, 3), torch.randint(0, 2, (4,)))
    client.create_model(net, loss="cross_entropy", example=example, workers=2, model_id="for-k6")
    reply = client._rpc.call("ComputeGradients", message)
    loss = nn.functional.cross_entropy(net(inputs), targets)
    assert reply.loss == pytest.approx(loss.item(), rel=1e-5)
    # What the script reads of the answer, by the names of its JSON form.
    text = (SCRIPTS / "k6_gradients.js").read_text()
    answer = json_format.MessageToDict(reply, always_print_fields_with_no_presence=True)
    read = re.findall(r"message\.timing\.(\w+)", text)
    assert len(read) == 3 and answer["timing"].keys() >= set(read)
    assert "message.gradients" in text and answer["gradients"]
