"""Finding a service: by argument, by environment, and the errors where there is none."""

from __future__ import annotations

import socket

import pytest

import gradwire
from gradwire import errors


def test_target_comes_from_the_environment_where_it_is_left_out(scripted, monkeypatch):
    monkeypatch.setenv("GRADWIRE_TARGET", scripted.target)
    with gradwire.connect(timeout=5) as client:
        assert client.target == scripted.target and scripted.target in repr(client)
        assert client.server_info().workers == 4


def test_argument_comes_before_the_environment(scripted, monkeypatch):
    monkeypatch.setenv("GRADWIRE_TARGET", "nowhere.invalid:1")
    with gradwire.connect(scripted.target, timeout=5) as client:
        assert client.target == scripted.target


def test_connecting_to_nothing_is_unavailable():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(errors.Unavailable, match="no gradwire service"):
            gradwire.connect(f"127.0.0.1:{unused.getsockname()[1]}", timeout=5)


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


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_timeout_that_is_not_above_zero_is_refused(timeout):
    with pytest.raises(errors.InvalidArgument) as caught:
        gradwire.connect("localhost:1", timeout=timeout)
    assert caught.value.field == "timeout"


def test_what_close_was_told_to_do_is_done_once(scripted):
    done = []
    client = gradwire.connect(scripted.target, timeout=5)
    client.on_close(lambda: done.append(1))
    client.close()
    client.close()
    assert done == [1]
