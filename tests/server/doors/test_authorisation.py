"""Every RPC of the service, over TLS, with every kind of credentials."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from certificates import needs_openssl
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gradwire_proto.errors import GradwireError, PermissionDenied, Unauthenticated
from gradwire_proto.status import from_rpc_error
from gradwire_proto.token_file import TokenFile
from gradwire_proto.v1 import dataset_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_server.doors.scopes import SCOPE_OF
from gradwire_server.rpc_handlers import SERVICE

pytestmark = needs_openssl

METHODS = {method.name: method for method in SERVICE.methods}
MINE = "models/mine"

ROWS: dict[str, Message] = {
    "CreateModel": pb.CreateModelRequest(model_id="mine"),
    "GetModel": pb.GetModelRequest(name=MINE),
    "ListModels": pb.ListModelsRequest(),
    "DeleteModel": pb.DeleteModelRequest(name=MINE),
    "UpdateModel": pb.UpdateModelRequest(name=MINE),
    "AddVariant": pb.AddVariantRequest(name=MINE),
    "GetCommand": pb.GetCommandRequest(name=f"{MINE}/commands/{uuid.uuid4()}"),
    "TrainStep": pb.TrainStepRequest(name=MINE),
    "TrainSteps": pb.TrainStepsRequest(steps=[pb.TrainStepRequest(name=MINE)]),
    "ForwardBackward": pb.ForwardBackwardRequest(name=MINE),
    "OptimizerStep": pb.OptimizerStepRequest(name=MINE),
    "ZeroGrad": pb.ZeroGradRequest(name=MINE),
    "LoadStateDict": pb.LoadStateDictRequest(name=MINE),
    "LoadOptimizerState": pb.LoadOptimizerStateRequest(name=MINE),
    "Backward": pb.BackwardRequest(name=MINE),
    "Release": pb.ReleaseRequest(name=MINE),
    "SetGradients": pb.SetGradientsRequest(name=MINE),
    "ComputeGradients": pb.ComputeGradientsRequest(name=MINE),
    "DifferentiateFunction": pb.DifferentiateFunctionRequest(),
    "Forward": pb.ForwardRequest(name=MINE),
    "GetGradients": pb.GetGradientsRequest(name=MINE),
    "GetStateDict": pb.GetStateDictRequest(name=MINE),
    "GetOptimizerState": pb.GetOptimizerStateRequest(name=MINE),
    "CreateCheckpoint": pb.CreateCheckpointRequest(parent=MINE, checkpoint_id="other"),
    "GetCheckpoint": pb.GetCheckpointRequest(name="checkpoints/mine"),
    "ListCheckpoints": pb.ListCheckpointsRequest(),
    "DeleteCheckpoint": pb.DeleteCheckpointRequest(name="checkpoints/mine"),
    "RestoreModel": pb.RestoreModelRequest(checkpoint="checkpoints/mine", model_id="mine"),
    "CreateDataset": dataset_pb2.CreateDatasetRequest(dataset_id="mine"),
    "GetDataset": dataset_pb2.GetDatasetRequest(name="datasets/mine"),
    "ListDatasets": dataset_pb2.ListDatasetsRequest(),
    "DeleteDataset": dataset_pb2.DeleteDatasetRequest(name="datasets/mine"),
    "Fit": dataset_pb2.FitRequest(name=MINE),
    "UploadTensors": pb.UploadTensorsRequest(manifest=pb.UploadManifest()),
    "DownloadTensors": pb.DownloadTensorsRequest(name="downloads/mine"),
    "GetServerInfo": pb.GetServerInfoRequest(),
}
"""A request of each RPC, to what alice has."""

NAMES_ONE = [name for name, row in ROWS.items() if "mine" in str(row) and name not in ("CreateModel", "CreateDataset")]
"""Those that name something of hers."""


def test_every_rpc_has_a_row_here_and_a_scope() -> None:
    assert ROWS.keys() == METHODS.keys() == SCOPE_OF.keys()


async def answer(channel: grpc.aio.Channel, name: str, request: Message, token: str = "") -> Any:
    """What an RPC answers, or the error that it ends with."""
    method = METHODS[name]
    path = f"/{SERVICE.full_name}/{name}"
    metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def messages() -> AsyncIterator[bytes]:
        yield request.SerializeToString()

    given = messages() if method.client_streaming else request.SerializeToString()
    kinds = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
    call: Callable[..., Any] = getattr(channel, "_".join(kinds))(path)
    reply = GetMessageClass(method.output_type)
    try:
        if method.server_streaming:
            return [reply.FromString(each) async for each in call(given, metadata=metadata)]
        return reply.FromString(await call(given, metadata=metadata))
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, command=True)


@pytest.fixture
def keys(tokens: TokenFile) -> dict[str, str]:
    """A token of each kind."""
    made = {
        "right": tokens.create("right", "alice", ["train"])[0],
        "read": tokens.create("reader", "alice", ["read"])[0],
        "other": tokens.create("other", "bob", ["train"])[0],
        "admin": tokens.create("admin", "operators", ["admin"])[0],
        "expired": tokens.create("expired", "alice", ["admin"], 0.001)[0],
        "revoked": tokens.create("revoked", "alice", ["admin"])[0],
    }
    tokens.revoke("revoked")
    good = made["right"]
    made["wrong"] = good[:-1] + ("A" if good[-1] != "A" else "B")
    time.sleep(0.01)
    return made


async def everything(frontend: Any, token: str) -> None:
    """Make what the rows name."""
    mine = frontend(token)
    await mine.stub.CreateModel(mine.creation("mine"))
    await mine.stub.CreateCheckpoint(pb.CreateCheckpointRequest(parent=MINE, checkpoint_id="mine"))
    batch = mine.train().batch
    await mine.stub.CreateDataset(dataset_pb2.CreateDatasetRequest(dataset_id="mine", batch=batch))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("", "TOKEN_MISSING"),
        ("wrong", "TOKEN_UNKNOWN"),
        ("expired", "TOKEN_EXPIRED"),
        ("revoked", "TOKEN_REVOKED"),
    ],
)
async def test_no_rpc_is_answered_without_a_good_token(
    locked: Any, keys: dict[str, str], kind: str, reason: str
) -> None:
    async with locked() as frontend:
        await everything(frontend, keys["right"])
        for name, row in ROWS.items():
            error = await answer(frontend.channel, name, row, keys.get(kind, ""))
            assert isinstance(error, Unauthenticated) and error.reason == reason, (name, error)
        # Nothing of it was done.
        assert len((await frontend(keys["right"]).stub.ListModels(pb.ListModelsRequest())).models) == 1


async def test_every_rpc_lets_its_scope_in_and_no_lesser_one(locked: Any, keys: dict[str, str]) -> None:
    async with locked() as frontend:
        await everything(frontend, keys["right"])
        for name, row in ROWS.items():
            if name.startswith("Delete"):
                continue
            allowed = await answer(frontend.channel, name, row, keys["right"])
            assert not isinstance(allowed, (Unauthenticated, PermissionDenied)), (name, allowed)
            read = await answer(frontend.channel, name, row, keys["read"])
            if SCOPE_OF[name] == "read":
                assert not isinstance(read, (Unauthenticated, PermissionDenied)), (name, read)
            else:
                assert isinstance(read, PermissionDenied) and read.reason == "SCOPE_MISSING", (name, read)
        for name in ("DeleteDataset", "DeleteCheckpoint", "DeleteModel"):
            refused = await answer(frontend.channel, name, ROWS[name], keys["read"])
            assert isinstance(refused, PermissionDenied), (name, refused)
            assert not isinstance(await answer(frontend.channel, name, ROWS[name], keys["right"]), GradwireError)


async def test_a_forward_that_changes_the_model_needs_more_than_reading(locked: Any, keys: dict[str, str]) -> None:
    async with locked() as frontend:
        await everything(frontend, keys["right"])
        inputs = frontend.train().batch.inputs
        plain = pb.ForwardRequest(name=MINE, inputs=inputs)
        assert not isinstance(await answer(frontend.channel, "Forward", plain, keys["read"]), GradwireError)
        for more in ({"training": True}, {"retain": pb.Retention()}):
            request = pb.ForwardRequest(name=MINE, inputs=inputs, **more)
            assert isinstance(await answer(frontend.channel, "Forward", request, keys["read"]), PermissionDenied)


async def test_what_is_anothers_does_not_exist(locked: Any, keys: dict[str, str]) -> None:
    async with locked() as frontend:
        await everything(frontend, keys["right"])
        for name in NAMES_ONE:
            never = type(ROWS[name])()
            never.ParseFromString(ROWS[name].SerializeToString().replace(b"mine", b"none"))
            anothers = await answer(frontend.channel, name, ROWS[name], keys["other"])
            nobodys = await answer(frontend.channel, name, never, keys["other"])
            assert isinstance(anothers, GradwireError) or name in ("Release", "TrainSteps"), (name, anothers)
            assert str(anothers).replace("mine", "none") == str(nobodys), name
            assert type(anothers) is type(nobodys)
        stub = frontend(keys["other"]).stub
        assert not (await stub.ListModels(pb.ListModelsRequest())).models
        assert not (await stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints
        assert not (await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())).datasets
        # Her names are free for him.
        await everything(frontend, keys["other"])
        for who in ("right", "other"):
            assert len((await frontend(keys[who]).stub.ListModels(pb.ListModelsRequest())).models) == 1


async def test_an_admin_acts_for_whom_the_call_names(locked: Any, keys: dict[str, str]) -> None:
    async with locked() as frontend:
        await everything(frontend, keys["right"])
        stub = frontend(keys["admin"]).stub
        request = pb.ListModelsRequest()
        assert not (await stub.ListModels(request)).models
        for_alice = (("gradwire-owner", "alice"),)
        assert len((await stub.ListModels(request, metadata=for_alice)).models) == 1
        refused = await frontend.error(frontend(keys["other"]).stub.ListModels(request, metadata=for_alice))
        assert isinstance(refused, PermissionDenied)
        refused = await frontend.error(stub.ListModels(request, metadata=(("gradwire-owner", "../alice"),)))
        assert isinstance(refused, PermissionDenied) and refused.field == "gradwire-owner"
