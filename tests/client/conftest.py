"""A real gRPC server on a free port whose answers a test writes down: what the SDK's own tests talk to."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cutting_proxy import CuttingProxy
from google.protobuf.message_factory import GetMessageClass

from gradwire.rpc import Rpc
from gradwire_proto import codec
from gradwire_proto.errors import GradwireError
from gradwire_proto.status import abort_arguments
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits, ModelInfo, ServerInfo

if TYPE_CHECKING:
    from client.one_model import OneModel

    from gradwire.client import Client
    from gradwire.model import Model

SERVICE = pb.DESCRIPTOR.services_by_name["GradientService"]
INFO = ServerInfo(version="0", torch_version="2", workers=4, free_workers=4, gpus=0.0, limits=Limits())

Answers = dict[str, Callable[[Any, grpc.ServicerContext], Any]]


class ScriptedService:
    """Answers each RPC with what `answers[method]` returns, given (request, context); GradwireErrors are sent as such.

    `calls` holds (method, request) in order of arrival; `tokens` each call's authorization.
    """

    def __init__(
        self, credentials: grpc.ServerCredentials | None = None, *, port: int = 0, answers: Answers | None = None
    ) -> None:
        self.answers: Answers = {"GetServerInfo": lambda request, context: codec.encode_server_info(INFO)}
        self.answers |= answers or {}
        self.calls: list[tuple[str, Any]] = []
        self.tokens: list[str | None] = []
        self.release = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_Handlers(self),))
        if credentials is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self._server.add_secure_port("localhost:0", credentials)
        self._server.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.calls.append((method, request))
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        if method not in self.answers:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the test has no answer for {method}")
        try:
            return self.answers[method](request, context)
        except GradwireError as error:
            code, details, metadata = abort_arguments(error)
            context.set_trailing_metadata(metadata)
            context.abort(code, details)

    def requests(self, method: str) -> list[Any]:
        """The requests to `method`, in order."""
        return [request for name, request in self.calls if name == method]

    def stop(self) -> None:
        self.release.set()
        self._server.stop(0).wait()


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, service: ScriptedService) -> None:
        self._service = service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = SERVICE.methods_by_name[handler_call_details.method.rpartition("/")[2]]
        if method.client_streaming and method.server_streaming:
            make = grpc.stream_stream_rpc_method_handler
        elif method.client_streaming:
            make = grpc.stream_unary_rpc_method_handler
        elif method.server_streaming:
            make = grpc.unary_stream_rpc_method_handler
        else:
            make = grpc.unary_unary_rpc_method_handler
        return make(
            lambda request, context: self._service.answer(method.name, request, context),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )


FREE_SERVER = """
import sys; sys.path[:0] = sys.argv[1].split(":")
from conftest import ScriptedService
service = ScriptedService(port=int(sys.argv[2]))
print(service.port, flush=True)
sys.stdin.read()
"""


class FreeServer:
    """A scripted service in a process of its own, so that it can be stopped and killed."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        here = Path(__file__).parent
        command = [sys.executable, "-c", FREE_SERVER, f"{here}:{here.parent}", str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.target = f"127.0.0.1:{self.port}"
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def free_server() -> Iterator[FreeServer]:
    server = FreeServer()
    yield server
    server.kill()


@pytest.fixture
def start_scripted() -> Iterator[Callable[..., ScriptedService]]:
    """Starts a ScriptedService, which takes the arguments; it stops with the test."""
    services: list[ScriptedService] = []

    def start(credentials: grpc.ServerCredentials | None = None, **options: Any) -> ScriptedService:
        services.append(ScriptedService(credentials, **options))
        return services[-1]

    yield start
    for service in services:
        service.stop()


@pytest.fixture
def scripted(start_scripted: Callable[..., ScriptedService]) -> ScriptedService:
    return start_scripted()


@pytest.fixture
def rpc(scripted: ScriptedService) -> Iterator[Rpc]:
    rpc = Rpc(scripted.target, timeout=5.0)
    yield rpc
    rpc.close()


@pytest.fixture
def proxy(scripted: ScriptedService) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(scripted.target)
    yield proxy
    proxy.close()


@pytest.fixture
def cut_rpc(proxy: CuttingProxy) -> Iterator[Rpc]:
    """Connected through `proxy`."""
    rpc = Rpc(proxy.target, timeout=8.0)
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    yield rpc
    rpc.close()


@pytest.fixture
def held_model(rpc: Rpc) -> Callable[..., Model]:
    """held_model(module, loss, example, **info) -> the Model of a module, as if the service held it as "mine"."""
    # Here: test_rpc.py starts this file as a program, which has no use for torch.
    from gradwire.export import ModuleExporter
    from gradwire.model import Model
    from gradwire.variants import without_graph

    def make(module: Any, loss: Any, example: tuple[Any, Any], **info: Any) -> Model:
        exported = ModuleExporter(module, loss).export_model(*example)
        program = exported.program
        variants = tuple(map(without_graph, program.variants))
        described = ModelInfo(
            id="mine",
            state="ready",
            step=0,
            workers=1,
            sharding=None,
            num_parameters=1,
            optimizer=None,
            loss=exported.loss,
            labels={},
            created_at=0.0,
            tensors=program.tensors,
            variants=variants,
        )
        return Model(rpc, replace(described, **info))

    return make


@pytest.fixture
def hosted(scripted: ScriptedService) -> OneModel:
    """The service holds what a client creates."""
    from client.one_model import OneModel

    return OneModel(scripted)


@pytest.fixture
def sdk(scripted: ScriptedService) -> Iterator[Client]:
    """A client of that service."""
    import gradwire

    with gradwire.connect(scripted.target, timeout=5) as sdk:
        yield sdk


@pytest.fixture
def model(sdk: Client, hosted: OneModel) -> Model:
    """One that it created: models/mine, a classifier of two ranks with SGD."""
    from client.one_model import batch, net

    from gradwire import optim

    return sdk.create_model(
        net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch(), workers=2, model_id="mine"
    )
