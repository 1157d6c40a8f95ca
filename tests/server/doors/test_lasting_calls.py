"""Tokens and certificates that change while the service runs, and calls that last meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_authority, make_certificate, needs_openssl
from server.local_peer import Peer, socket_of

from gradwire_proto.errors import FailedPrecondition, Unauthenticated
from gradwire_proto.token_file import TokenFile
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2
from gradwire_server.doors import token_book
from gradwire_server.doors.certificates import Certificates

pytestmark = needs_openssl


async def test_token_that_is_made_or_revoked_is_so_at_once(locked: Any, tokens: TokenFile) -> None:
    async with locked() as frontend:
        token, _ = tokens.create("late", "alice", ["read"])
        await frontend(token).stub.ListModels(pb.ListModelsRequest())
        tokens.revoke("late")
        error = await frontend.error(frontend(token).stub.ListModels(pb.ListModelsRequest()))
        assert isinstance(error, Unauthenticated) and error.reason == "TOKEN_REVOKED"
        # What it does is not repeated by retries.
        assert not error.retryable


async def test_file_that_breaks_leaves_the_tokens_as_they_were(locked: Any, tokens: TokenFile) -> None:
    token, _ = tokens.create("good", "alice", ["read"])
    async with locked() as frontend:
        good = tokens.path.read_bytes()
        tokens.path.write_bytes(b"{")
        await frontend(token).stub.ListModels(pb.ListModelsRequest())
        tokens.path.unlink()
        await frontend(token).stub.ListModels(pb.ListModelsRequest())
        tokens.path.write_bytes(good)
        tokens.revoke("good")
        error = await frontend.error(frontend(token).stub.ListModels(pb.ListModelsRequest()))
        assert isinstance(error, Unauthenticated)


async def test_stream_of_steps_ends_when_its_token_is_revoked(locked: Any, tokens: TokenFile) -> None:
    token, _ = tokens.create("trainer", "alice", ["train"])
    async with locked() as frontend:
        mine = frontend(token)
        await mine.stub.CreateModel(mine.creation("m"))
        call = mine.stub.TrainSteps(_forever(mine))
        await call.read()
        tokens.revoke("trainer")
        error = await frontend.error(asyncio.wait_for(_to_its_end(call), 10))
        assert isinstance(error, Unauthenticated) and error.reason == "TOKEN_REVOKED"


async def _to_its_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _forever(frontend: Any) -> Any:
    while True:
        yield pb.TrainStepsRequest(steps=[frontend.train()])
        await asyncio.sleep(0.01)


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: that of a socket must be."""
    with tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as folder:
        yield Path(folder)


async def test_socket_of_this_machine_wants_the_token_too(locked: Any, tokens: TokenFile, sockets: Path) -> None:
    token, _ = tokens.create("trainer", "alice", ["train"])
    reader, _ = tokens.create("reader", "alice", ["read"])
    async with locked(sockets=sockets) as frontend:
        mine = frontend(token)
        await mine.stub.CreateModel(mine.creation("m"))
        step = local_pb2.LocalCall(
            method="TrainStep", request=frontend.train().SerializeToString(), timeout_seconds=10.0
        )

        async def ask(hello: str | None, reason: str) -> None:
            peer = Peer(await socket_of(mine))
            if hello is not None:
                reply, _ = await peer.ask(local_pb2.LocalRequest(hello=local_pb2.LocalHello(token=hello)))
                if reply.WhichOneof("kind") == "refusal":
                    assert reply.refusal.reason == reason
                    return
            reply, _ = await peer.ask(local_pb2.LocalRequest(call=step))
            assert (reply.refusal.reason or reply.WhichOneof("kind")) == reason
            peer.socket.close()

        await ask(token, "response")
        await ask(None, "TOKEN_MISSING")
        await ask("", "TOKEN_MISSING")
        await ask("gw_00000000_" + "x" * 43, "TOKEN_UNKNOWN")
        await ask(reader, "SCOPE_MISSING")
        peer = Peer(await socket_of(mine))
        await peer.ask(local_pb2.LocalRequest(hello=local_pb2.LocalHello(token=token)))
        tokens.revoke("trainer")
        reply, _ = await peer.ask(local_pb2.LocalRequest(call=step))
        assert reply.refusal.reason == "TOKEN_REVOKED"
        peer.socket.close()


async def test_certificate_that_is_renewed_is_shown_without_a_restart(
    locked: Any, tokens: TokenFile, certificates: Path, tmp_path: Path
) -> None:
    token, _ = tokens.create("reader", "alice", ["read"])
    folder = tmp_path / "renewed"
    shutil.copytree(certificates, folder)
    make_authority(folder, "new-ca")
    old, new = ((folder / name).read_bytes() for name in ("ca.pem", "new-ca.pem"))
    settings = {"tls_certificate": folder / "server.pem", "tls_key": folder / "server.key"}
    async with locked(**settings) as frontend:

        async def trusts(authority: bytes) -> bool:
            options = [("grpc.use_local_subchannel_pool", 1)]
            credentials = grpc.ssl_channel_credentials(authority)
            async with grpc.aio.secure_channel(frontend.target, credentials, options=options) as channel:
                stub = type(frontend)(frontend, channel)(token).stub
                call = stub.ListModels(pb.ListModelsRequest(), timeout=5)
                code = await call.code()
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
                return code == grpc.StatusCode.OK

        assert await trusts(old) and not await trusts(new)
        # Half of the pair: what was there stays.
        make_certificate(folder, "renewed", "new-ca")
        os.replace(folder / "renewed.pem", folder / "server.pem")
        assert await trusts(old) and not await trusts(new)
        os.replace(folder / "renewed.key", folder / "server.key")
        assert await trusts(new) and not await trusts(old)


async def test_client_without_a_certificate_is_not_let_in_where_one_is_wanted(
    locked: Any, tokens: TokenFile, certificates: Path
) -> None:
    token, _ = tokens.create("reader", "alice", ["read"])
    async with locked(tls_client_ca=certificates / "ca.pem") as frontend:
        authority, key, chain = ((certificates / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await frontend(token).stub.ListModels(pb.ListModelsRequest(), timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        credentials = grpc.ssl_channel_credentials(authority, key, chain)
        async with grpc.aio.secure_channel(frontend.target, credentials) as channel:
            await type(frontend)(frontend, channel)(token).stub.ListModels(pb.ListModelsRequest(), timeout=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"certificate": "none.pem"}, "tls_certificate"),
        ({"key": "none.key"}, "tls_key"),
        ({"key": "client.key"}, "no certificate and its key"),
        ({"certificate": "ca.key"}, "no certificate and its key"),
        ({"client_ca": "server.key"}, "tls_client_ca"),
    ],
)
def test_bad_certificate_is_said_in_one_line(certificates: Path, change: dict[str, str], words: str) -> None:
    files = {"certificate": "server.pem", "key": "server.key"} | change
    with pytest.raises(FailedPrecondition) as caught:
        Certificates(**{name: certificates / file for name, file in files.items()}).credentials()
    assert words in str(caught.value) and "\n" not in str(caught.value)


async def test_service_does_not_start_without_its_tokens(start: Any, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async with start(tokens=tmp_path / "none.json"):
            pass
    assert caught.value.reason == "TOKENS_UNREADABLE" and "none.json" in str(caught.value)


def test_changes_are_looked_for_no_more_often_than_is_said(tokens: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = tokens.create("one", "alice", ["read"])
    now = [0.0]
    monkeypatch.setattr(token_book.time, "monotonic", lambda: now[0])
    book = token_book.TokenBook(tokens.path)
    record = book.find(token)
    tokens.revoke("one")
    now[0] = token_book.LOOK_SECONDS / 2
    assert book.still_good(record) == record
    now[0] = token_book.LOOK_SECONDS
    with pytest.raises(Unauthenticated):
        book.still_good(record)
    # One that is new is found at once.
    other, _ = tokens.create("two", "alice", ["train"])
    assert book.find(other).name == "two"
