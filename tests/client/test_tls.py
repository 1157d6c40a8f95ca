"""Encrypted connections: who is trusted, who is not, and that the client can show a certificate."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from certificates import make_authority, make_certificate, needs_openssl
from client.one_model import OneModel, empty
from typer.testing import CliRunner

import gradwire
from gradwire import errors
from gradwire.cli import app

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca, server, client (all of one authority) and stranger (signed by itself) as .pem and .key."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "stranger"):
        make_authority(folder, name)
    for name in ("server", "client"):
        make_certificate(folder, name)
    return folder


@pytest.fixture(params=[False, True], ids=["one-sided", "mutual"])
def mutual(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def service(start_scripted, certificates: Path, mutual: bool):
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    authority = (certificates / "ca.pem").read_bytes() if mutual else None
    return start_scripted(grpc.ssl_server_credentials([pair], authority, require_client_auth=mutual))


def test_trusted_server_answers_over_tls_and_gets_the_token(service, certificates, mutual):
    tls = gradwire.TLS(
        ca=certificates / "ca.pem",
        certificate=(certificates / "client.pem").read_bytes() if mutual else None,
        key=str(certificates / "client.key") if mutual else None,
    )
    with gradwire.connect(service.target, token="t", tls=tls, timeout=5) as client:
        assert client.server_info().workers == 4
    assert set(service.tokens) == {"Bearer t"}


@pytest.mark.parametrize("authority", ["stranger", None], ids=["another authority", "system roots"])
def test_server_of_an_unknown_authority_is_unavailable(service, certificates, authority):
    tls = gradwire.TLS(ca=certificates / f"{authority}.pem") if authority else True
    with pytest.raises(errors.Unavailable, match="no gradwire service"):
        gradwire.connect(service.target, tls=tls, timeout=3)
    assert service.calls == []


def test_plain_text_to_a_tls_server_is_unavailable(service):
    with pytest.raises(errors.Unavailable):
        gradwire.connect(service.target, timeout=3)


def test_certificate_without_key_is_refused():
    with pytest.raises(errors.InvalidArgument, match="together"):
        gradwire.TLS(certificate=b"pem")


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(errors.InvalidArgument, match="absent") as caught:
        gradwire.connect("localhost:1", tls=gradwire.TLS(ca=tmp_path / "absent.pem"))
    assert caught.value.field == "tls.ca"


@pytest.mark.parametrize("argument", ["ca", "certificate"])
def test_pem_that_is_neither_bytes_nor_a_path_is_named(argument):
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.TLS(**{"certificate": b"pem", "key": b"key"} | {argument: 5})  # type: ignore[arg-type]
    assert caught.value.field == f"tls.{argument}"


def test_path_that_no_file_can_have_is_named():
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect("localhost:1", tls=gradwire.TLS(ca="a\0b"))
    assert caught.value.field == "tls.ca"


def test_repr_keeps_the_key_to_itself():
    assert "secret" not in repr(gradwire.TLS(certificate=b"c", key=b"secret"))


def test_load_test_is_encrypted_too(service, certificates, mutual):
    OneModel(service)
    service.answers["DeleteModel"] = lambda request, context: empty()
    own = ["--tls-certificate", str(certificates / "client.pem"), "--tls-key", str(certificates / "client.key")]
    flags = ["--tls-ca", str(certificates / "ca.pem"), *(own if mutual else [])]
    quick = ["--concurrency=1", "--method=train_step", "--layers=3,2", "--warm-up=0", "--window=0.1", "--max-windows=1"]
    outcome = CliRunner().invoke(app, ["load-test", "--target", service.target, *flags, *quick])
    assert outcome.exit_code == 0, outcome.output
    assert len(service.requests("TrainStep")) > 1
