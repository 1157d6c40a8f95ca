"""Which requests are known, and for how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_proto.errors import FailedPrecondition, InvalidArgument, ModelNotFound, ResourceExhausted, Unavailable
from gradwire_server.aging import REMEMBER_SECONDS
from gradwire_server.calls import Call
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.saved_model import decode_replies, encode_replies
from gradwire_server.stored_replies import EndedCommand, ended_command


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def call(name: str) -> Call:
    return Call(request_id=name, body=name.encode())


def end(log: RequestLog[Any], name: str, error: Any = None) -> None:
    """A request that was applied, or ended with an error."""
    log.add(call(name), SimpleNamespace(ended=True, error=error))
    if error is None:
        log.store(call(name), EndedCommand(1, "ZeroGrad", b"reply"))
    log.settle(call(name))


def is_known(log: RequestLog[Any], name: str) -> bool:
    """Whether a repeat is not applied again."""
    try:
        return log.find(call(name)) is not None
    except FailedPrecondition as error:
        return (error.reason, error.outcome) == ("REPLY_FORGOTTEN", "applied")


def test_request_is_known_for_ten_minutes_after_its_end_and_while_it_is_among_the_newest() -> None:
    clock = Clock()
    log: RequestLog[Any] = RequestLog(2, 100, clock=clock)
    for name in "abc":
        end(log, name)
    clock.now += REMEMBER_SECONDS - 1
    end(log, "d")
    assert all(is_known(log, name) for name in "abcd")
    clock.now += 1
    end(log, "e")
    assert [is_known(log, name) for name in "abcde"] == [False, False, False, True, True]
    clock.now += 10 * REMEMBER_SECONDS
    assert is_known(log, "d") and is_known(log, "e")


def test_what_was_declared_not_applied_stays_so_for_as_long_as_requests_are_known() -> None:
    clock = Clock()
    log: RequestLog[Any] = RequestLog(2, 100, clock=clock)
    for name in "ab":
        with pytest.raises(ModelNotFound):
            log.get(name)
        clock.now += REMEMBER_SECONDS - 1
    with pytest.raises(FailedPrecondition, match="declared not applied"):
        log.find(call("b"))
    clock.now += 1
    with pytest.raises(ModelNotFound):
        log.get("c")
    assert log.find(call("a")) is None


def test_of_more_unknown_requests_than_are_kept_nothing_is_declared(monkeypatch: Any) -> None:
    monkeypatch.setattr("gradwire_server.request_log._MOST", 3)
    clock = Clock()
    log: RequestLog[Any] = RequestLog(2, 100, clock=clock)
    for name in "abca":
        with pytest.raises(ModelNotFound):
            log.get(name)
    with pytest.raises(ResourceExhausted, match="so many commands"):
        log.get("d")
    assert log.find(call("d")) is None
    for name in "abc":
        with pytest.raises(FailedPrecondition, match="declared not applied"):
            log.find(call(name))
    clock.now += REMEMBER_SECONDS
    with pytest.raises(ModelNotFound):
        log.get("d")


def test_so_many_requests_are_known_at_most(monkeypatch: Any) -> None:
    monkeypatch.setattr("gradwire_server.request_log._MOST", 3)
    log: RequestLog[Any] = RequestLog(2, 100, clock=Clock())
    for number in range(20):
        end(log, str(number))
    assert [number for number in range(20) if is_known(log, str(number))] == list(range(15, 20))


def test_old_request_that_was_refused_is_not_taken_for_one_that_was_applied() -> None:
    log: RequestLog[Any] = RequestLog(1, 100, clock=Clock())
    end(log, "a", InvalidArgument("no", reason="TARGET_OUT_OF_RANGE"))
    end(log, "b")
    end(log, "c")
    found = log.find(call("a"))
    assert found is not None and found.error is not None and found.error.reason == "TARGET_OUT_OF_RANGE"
    with pytest.raises(InvalidArgument, match="another request"):
        log.find(Call(request_id="a", body=b"another"))


def test_request_of_which_nobody_knows_what_became_keeps_its_place_until_it_is_settled() -> None:
    log: RequestLog[Any] = RequestLog(1, 100, clock=Clock())
    end(log, "a", InvalidArgument("lost", outcome="unknown"))
    job = log.get("a")
    for name in "bcd":
        end(log, name)
    assert log.get("a") is job


def test_what_is_stored_keeps_its_age_and_what_has_none_ended_now() -> None:
    clock = Clock()
    log: RequestLog[Any] = RequestLog(1, 100, clock=clock)
    end(log, "a")
    clock.now += REMEMBER_SECONDS / 2
    end(log, "b")
    older, newer = log.stored()()
    assert (older, newer) == log.stored()(), "what is noted of older ones is what was found"
    stored = decode_replies(b"".join(encode_replies(newer, older)))
    assert [(each.request_id, each.ended_at) for each in stored] == [("a", 1e9), ("b", clock.now)]
    assert [each.reply for each in stored] == [None, b"reply"], "replies go as they do here"
    again: RequestLog[Any] = RequestLog(1, 100, clock=clock)
    for each in stored:
        again.restore(each.request_id, each.body, ended_command(each), each.ended_at)
    again.restore("of the journal", b"of the journal", EndedCommand(2, "ZeroGrad", b""))
    clock.now += REMEMBER_SECONDS / 2
    end(again, "c")
    assert [is_known(again, name) for name in ("a", "b", "of the journal", "c")] == [False, True, True, True]


def test_request_that_was_applied_after_it_was_refused_is_known_as_applied() -> None:
    log: RequestLog[Any] = RequestLog(2, 100, clock=Clock())
    log.restore("a", b"a", EndedCommand(1, "ZeroGrad", None, InvalidArgument("it kills", reason="COMMAND_KILLS_RANKS")))
    log.restore("a", b"a", EndedCommand(2, "ZeroGrad", b"reply"))
    found = log.find(call("a"))
    assert isinstance(found, EndedCommand) and found.error is None


def test_reply_of_a_request_of_which_nobody_knows_what_became_of_it_is_not_forgotten() -> None:
    log: RequestLog[Any] = RequestLog(10, 100)
    unknown = SimpleNamespace(ended=True, error=Unavailable("the disk is away", outcome="unknown"))
    log.add(call("unknown"), unknown)
    log.weigh(call("unknown"), 80)
    end(log, "applied")
    log.weigh(call("applied"), 80)
    assert log.find(call("unknown")) is unknown
    with pytest.raises(FailedPrecondition, match="its reply is no longer stored"):
        log.find(call("applied"))
