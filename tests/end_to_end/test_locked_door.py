"""A service with TLS and tokens, as its own SDK and clients that nobody here wrote come in."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from certificates import make_authority, make_certificate, needs_openssl
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from torch import nn

import gradwire
from gradwire import errors, optim
from gradwire_proto.token_file import TokenFile
from gradwire_proto.v1 import gradient_service_pb2 as pb

pytestmark = [needs_openssl, pytest.mark.slow]

SERVICE = "gradwire.v1.GradientService"
NPM_PACKAGES = ("@grpc/grpc-js@1", "@grpc/proto-loader@0.8")


@dataclass
class Locked:
    """A service that runs, and what its operator has."""

    target: str
    folder: Path
    tokens: TokenFile
    process: subprocess.Popen[str]

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """One that a command line has started."""
    folder = tmp_path_factory.mktemp("locked")
    make_authority(folder)
    make_certificate(folder, "server")
    tokens = TokenFile(folder / "tokens.json")
    tokens.create("first", "nobody", ["read"])
    command = [sys.executable, "-m", "gradwire.cli", "serve", "--listen=127.0.0.1:0", "--workers=4"]
    command += [f"--tls-certificate={folder}/server.pem", f"--tls-key={folder}/server.key", f"--tokens={tokens.path}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("gradwire listening on "), (folder / "log").read_text()
    port = line.split()[-1].rpartition(":")[2]
    yield Locked(f"localhost:{port}", folder, tokens, process)
    process.terminate()
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def token(locked: Locked) -> str:
    return locked.tokens.create("alice", "alice", ["train"])[0]


def test_sdk_trains_over_tls_with_its_token_and_only_with_it(locked: Locked, token: str) -> None:
    net = nn.Linear(3, 1)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    with gradwire.connect(locked.target, token=token, tls=gradwire.TLS(ca=locked.ca)) as client:
        model = client.create_model(
            net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=(x, y), model_id="hers", workers=2
        )
        assert model.train_step(x, y).step == 1
        assert [each.step for each in model.train_steps((x, y) for _ in range(3))] == [2, 3, 4]
        (value, (gradient,)) = client.value_and_grad(lambda w: (w * w).sum(), argnums=(0,))(torch.ones(2))
        assert value == 2 and gradient.tolist() == [2, 2]
    with pytest.raises(errors.Unauthenticated):
        gradwire.connect(locked.target, tls=gradwire.TLS(ca=locked.ca))
    other = locked.tokens.create("bob", "bob", ["train"])[0]
    with gradwire.connect(locked.target, token=other, tls=gradwire.TLS(ca=locked.ca)) as client:
        assert client.list_models() == []
        with pytest.raises(errors.ModelNotFound):
            client.get_model("hers").info()
        model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), model_id="hers")
        assert model.info().step == 0
    # Nobody's ranks have served somebody else: hers run still.
    with gradwire.connect(locked.target, token=token, tls=gradwire.TLS(ca=locked.ca)) as client:
        assert client.get_model("hers").info().step == 4


def test_commands_bring_token_and_certificates(locked: Locked, token: str) -> None:
    command = [sys.executable, "-m", "gradwire.cli", "models", "list", "--json", f"--target={locked.target}"]
    environment = os.environ | {"GRADWIRE_TOKEN": token, "GRADWIRE_TLS_CA": str(locked.ca)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert isinstance(json.loads(found.stdout), list)
    environment["GRADWIRE_TOKEN"] = "gw_00000000_" + "x" * 43
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and refused.stderr == "gradwire: the token is not known here\n"


def test_no_process_and_no_log_of_the_service_has_a_token(locked: Locked, token: str) -> None:
    secrets = [token, token.rpartition("_")[2]]
    told = [(locked.folder / "log").read_text()]
    for process in (psutil.Process(locked.process.pid), *psutil.Process(locked.process.pid).children(recursive=True)):
        told += [" ".join(process.cmdline()), str(process.environ())]
    assert not [secret for secret in secrets if any(secret in text for text in told)]


def test_grpcurl_comes_in_with_a_token(locked: Locked, token: str) -> None:
    program = shutil.which("grpcurl", path=sysconfig.get_path("scripts"))
    assert program
    ask = [program, "-cacert", str(locked.ca), "-d", "{}"]
    path = f"{SERVICE}/ListModels"
    good = subprocess.run(
        [*ask, "-rpc-header", f"authorization: Bearer {token}", locked.target, path],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([*ask, locked.target, path], capture_output=True, text=True, timeout=30)
    assert "Unauthenticated" in bad.stderr and "TOKEN_MISSING" in bad.stderr


async def test_grpclib_comes_in_with_a_token(locked: Locked, token: str) -> None:
    host, port = locked.target.split(":")
    trusted = ssl.create_default_context(cafile=str(locked.ca))
    trusted.set_alpn_protocols(["h2"])
    channel = Channel(host, int(port), ssl=trusted)
    try:
        ask = UnaryUnaryMethod(channel, f"/{SERVICE}/ListModels", pb.ListModelsRequest, pb.ListModelsResponse)
        await ask(pb.ListModelsRequest(), metadata={"authorization": f"Bearer {token}"}, timeout=10)
        with pytest.raises(GRPCError) as refused:
            await ask(pb.ListModelsRequest(), timeout=10)
        assert refused.value.status is Status.UNAUTHENTICATED
    finally:
        channel.close()


GRPC_JS = """
const grpc = require("@grpc/grpc-js"), loader = require("@grpc/proto-loader"), fs = require("fs");
const [target, ca, token, ...folders] = process.argv.slice(1);
const definition = loader.loadSync("gradwire_proto/v1/gradient_service.proto", { includeDirs: folders });
const { GradientService } = grpc.loadPackageDefinition(definition).gradwire.v1;
const client = new GradientService(target, grpc.credentials.createSsl(fs.readFileSync(ca)));
const metadata = new grpc.Metadata();
metadata.set("authorization", `Bearer ${token}`);
client.listModels({}, metadata, (error, reply) => {
  if (error) throw error;
  client.listModels({}, (refused) => {
    console.log(JSON.stringify({ models: reply.models.length, code: refused.code }));
    client.close();
  });
});
"""


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with grpc-js, kept beside the Python that runs."""
    folder = Path(sys.prefix) / "node"
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    if not (folder / "node_modules/@grpc/proto-loader").exists():
        folder.mkdir(exist_ok=True)
        install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent", *NPM_PACKAGES]
        subprocess.run(install, cwd=folder, check=True, timeout=300)
    return folder / "node_modules"


def test_grpc_js_comes_in_with_a_token(locked: Locked, token: str, node_modules: Path, repository: Path) -> None:
    command = ["node", "--eval", GRPC_JS, locked.target, str(locked.ca), token]
    command += [str(repository / "proto"), sysconfig.get_path("purelib")]
    environment = os.environ | {"NODE_PATH": str(node_modules)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["code"] == 16  # UNAUTHENTICATED
