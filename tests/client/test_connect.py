"""Finding a service: by argument, by environment, and the errors where there is none."""

from __future__ import annotations

import socket
import time

import pytest

import gradwire
from gradwire import errors


@pytest.mark.parametrize("left_out", [None, ""])
def test_target_comes_from_the_environment_where_it_is_left_out(scripted, monkeypatch, left_out):
    monkeypatch.setenv("GRADWIRE_TARGET", scripted.target)
    with gradwire.connect(left_out, timeout=5) as client:
        assert client.target == scripted.target and scripted.target in repr(client)
        assert client.server_info().workers == 4


def test_argument_comes_before_the_environment(scripted, monkeypatch):
    monkeypatch.setenv("GRADWIRE_TARGET", "nowhere.invalid:1")
    with gradwire.connect(scripted.target, timeout=5) as client:
        assert client.target == scripted.target


def test_connecting_to_nothing_is_unavailable():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(errors.Unavailable, match="no gradwire service"):
            gradwire.connect(f"127.0.0.1:{unused.getsockname()[1]}", timeout=30)
        assert time.monotonic() - start < 10, "it waited for a service that is not there"


@pytest.mark.parametrize("target", ["nonsense", "http://localhost:1", "[::1:4", "no.such.host.invalid:1"])
def test_target_that_names_nothing_was_never_connected(target):
    with pytest.raises(errors.Unavailable, match="no gradwire service") as caught:
        gradwire.connect(target, timeout=5)
    assert (caught.value.reason, caught.value.outcome) == ("NOT_CONNECTED", "not_applied")


def test_wrong_token_is_unauthenticated(scripted):
    def refuse(request, context):
        raise errors.Unauthenticated("which token?", reason="TOKEN_UNKNOWN")

    scripted.answers["GetServerInfo"] = refuse
    with pytest.raises(errors.Unauthenticated, match="which token"):
        gradwire.connect(scripted.target, token="wrong", timeout=5)
    assert scripted.tokens == ["Bearer wrong"]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), 10**400, "a", True, None])
def test_timeout_that_is_not_above_zero_is_refused(timeout):
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect("localhost:1", timeout=timeout)
    assert caught.value.field == "timeout"


@pytest.mark.parametrize("token", ["secret\n", "sec\tret", "s\u00e9cret", "secret\x7f", "secret\ud800", b"secret", 5])
def test_token_that_no_header_holds_is_refused_without_being_shown(scripted, token):
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect(scripted.target, token=token, timeout=5)
    error = caught.value
    assert error.field == "token" and scripted.calls == []
    assert not any(part in f"{error!s}{error!r}{error.__cause__}" for part in ("cret", "sec", "5"))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"target": 5}, "target"),
        ({"target": b"localhost:1"}, "target"),
        ({"target": "\ud800:1"}, "target"),
        ({"tls": 5}, "tls"),
        ({"tls": "ca.pem"}, "tls"),
    ],
)
def test_argument_of_the_wrong_kind_is_named(arguments, field):
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect(**{"target": "localhost:1", "timeout": 5} | arguments)
    assert caught.value.field == field


PORTS = ["99999", "65536", "0", "-1", "+70", "1" * 5000]


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "dns:///localhost", ""])
def test_port_that_cannot_exist_is_refused_and_no_other_is_dialled(host, port):
    with pytest.raises(errors.InvalidArgument, match="1 to 65535") as caught:
        gradwire.connect(f"{host}:{port}", timeout=5)
    assert (caught.value.field, caught.value.reason) == ("target", "TARGET_INVALID")


def test_port_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("GRADWIRE_TARGET", "localhost:99999")
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect(timeout=5)
    assert caught.value.field == "target"


@pytest.mark.parametrize("target", ["unix:/tmp/no-such-socket:99999", "fe80::1:99999", "[::1]", "localhost:65535"])
def test_what_is_no_port_or_a_right_one_is_left_to_grpc(target):
    with pytest.raises(errors.Unavailable):
        gradwire.connect(target, timeout=2)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"timeout": -1}, "timeout"),
        ({"timeout": "a"}, "timeout"),
        ({"start_timeout": 0}, "start_timeout"),
        ({"start_timeout": float("inf")}, "start_timeout"),
        ({"workers": "two"}, "workers"),
        ({"storage": 5}, "storage"),
    ],
)
def test_launch_refuses_a_wrong_argument_before_it_starts_anything(arguments, field, monkeypatch):
    def start(*_: object) -> None:
        raise AssertionError("a service was started")

    monkeypatch.setattr("gradwire.embedded_service.EmbeddedService", start)
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.launch(**arguments)
    assert caught.value.field == field


def test_launch_says_how_long_it_waited():
    with pytest.raises(errors.Unavailable, match=r"not ready within 0\.05 s"):
        gradwire.launch(workers=1, start_timeout=0.05)


def test_what_close_was_told_to_do_is_done_once(scripted):
    done = []
    client = gradwire.connect(scripted.target, timeout=5)
    client.on_close(lambda: done.append(1))
    client.close()
    client.close()
    assert done == [1]
