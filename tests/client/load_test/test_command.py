"""`gradwire load-test` as scripts use it, against a service whose answers are written down here."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client.one_model import OneModel, empty
from typer.testing import CliRunner, Result

from gradwire.cli import app
from gradwire.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

QUICK = ("--layers=3,2", "--warm-up=0", "--window=0.1", "--max-windows=3", "--stable=9")


@pytest.fixture
def served(scripted, hosted: OneModel):
    """The scripted service, which holds one model and takes gradients."""
    timing = model_pb2.Timing(queue=0.001, compute=0.002, total=0.003)
    scripted.answers |= {
        "ComputeGradients": lambda request, context: pb.ComputeGradientsResponse(timing=timing),
        "DeleteModel": lambda request, context: empty(),
    }
    return scripted


def load_test(*arguments: str, quick: tuple[str, ...] = QUICK) -> Result:
    return CliRunner().invoke(app, ["load-test", *quick, *arguments])


def test_levels_are_measured_printed_and_written(served, tmp_path: Path) -> None:
    files = {name: tmp_path / f"result.{name}" for name in ("csv", "json", "html")}
    flags = [f"--{name}={path}" for name, path in files.items()]
    outcome = load_test("--target", served.target, "--concurrency=1,3", "--token=secret", "--workers=1", *flags)
    assert outcome.exit_code == 0, outcome.stderr
    for text in ("concurrency 1", "concurrency 3", "p99", "compute", str(files["html"])):
        assert text in outcome.stdout, text
    assert outcome.stderr.count("requests/s, p99") == 2
    assert files["csv"].read_text().count("\n") == 3
    assert files["html"].read_text().startswith("<!doctype html>")
    levels = json.loads(files["json"].read_text())["levels"]
    assert [level["compute_ms"] for level in levels] == [2.0, 2.0]
    # Every request was one of ours, and carried the token; the model says whose it is, and is gone.
    assert set(served.tokens) == {"Bearer secret"}
    assert sum(level["requests"] for level in levels) <= len(served.requests("ComputeGradients"))
    (created,) = served.requests("CreateModel")
    assert created.model.labels == {"made-by": "gradwire-load-test"}
    assert [request.name for request in served.requests("DeleteModel")] == [f"models/{created.model_id}"]


def test_train_steps_are_commands_of_their_own(served) -> None:
    assert load_test("--target", served.target, "--concurrency=2", "--method=train_step").exit_code == 0
    ids = [request.request_id for request in served.requests("TrainStep")]
    assert len(ids) == len(set(ids)) > 3
    assert len({request.batch.SerializeToString() for request in served.requests("TrainStep")}) == 1


def test_failed_requests_are_exit_code_1_and_told_by_reason(served) -> None:
    answer = served.answers["ComputeGradients"]

    def now_and_then(request, context):
        if len(served.calls) % 3 == 0 and len(served.requests("ComputeGradients")) > 1:
            raise ResourceExhausted("the queue is full", reason="QUEUE_FULL")
        return answer(request, context)

    served.answers["ComputeGradients"] = now_and_then
    outcome = load_test("--target", served.target, "--concurrency=1")
    assert outcome.exit_code == 1
    assert "QUEUE_FULL" in outcome.stdout


def test_level_that_is_not_stable_fails_with_strict_alone(served) -> None:
    unsteady = ("--target", served.target, "--concurrency=1", "--stable=1e-9")
    assert load_test(*unsteady).exit_code == 0
    outcome = load_test(*unsteady, "--strict")
    assert (outcome.exit_code, "unstable" in outcome.stdout) == (1, True)


def test_sweep_ends_after_the_level_that_is_too_slow(served) -> None:
    outcome = load_test("--target", served.target, "--concurrency=1,2,4", "--latency-limit=0.001")
    assert outcome.exit_code == 0
    assert ("concurrency 1" in outcome.stdout, "concurrency 2" in outcome.stdout) == (True, False)


def test_search_halves_the_levels_for_the_highest_within_the_limit(served) -> None:
    lock, waiting, crowd = threading.Lock(), 0, 0

    def slow_in_a_crowd(request, context):
        nonlocal waiting, crowd
        with lock:
            waiting += 1
            crowd = max(crowd, waiting)
        time.sleep(0.3 if crowd > 4 else 0.005)
        with lock:
            waiting -= 1
            crowd = crowd if waiting else 0
        return pb.ComputeGradientsResponse()

    served.answers["ComputeGradients"] = slow_in_a_crowd
    outcome = load_test("--target", served.target, "--concurrency=2:8:2", "--latency-limit=60", "--search")
    assert outcome.exit_code == 0
    assert "highest within the limit: concurrency 4" in outcome.stdout
    measured = re.findall(r"^(concurrency \d):", outcome.stderr, re.MULTILINE)
    assert measured == ["concurrency 6", "concurrency 4"]
    # Shown in the order of the levels, not in that of the search.
    assert outcome.stdout.index("concurrency 4") < outcome.stdout.index("concurrency 6")


def test_floor_is_a_bare_echo_of_the_same_reply(served, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    outcome = load_test("--target", served.target, "--concurrency=2", "--floor", f"--json={path}")
    assert outcome.exit_code == 0
    assert "ratio" in outcome.stdout
    (level,) = json.loads(path.read_text())["levels"]
    # The echo's reply tells the same times, because it has the same bytes.
    assert level["floor"]["compute_ms"] == 2.0
    assert level["floor"]["requests"] > 0
    assert level["ratio"] == pytest.approx(level["requests_per_second"] / level["floor_requests_per_second"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_test_shows_what_it_has_and_deletes_its_models(served, number: signal.Signals) -> None:
    answer: Callable = served.answers["ComputeGradients"]

    def interrupting(request, context):
        if len(served.requests("ComputeGradients")) == 40:
            signal.raise_signal(number)
        return answer(request, context)

    served.answers["ComputeGradients"] = interrupting
    # One level of some requests, then one that would go on for an hour.
    slow = ("--warm-up=0", "--window=1200", "--max-windows=3", "--layers=3,2")
    outcome = load_test("--target", served.target, "--concurrency=1", quick=slow)
    assert outcome.exit_code == 130
    assert len(served.requests("DeleteModel")) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--concurrency=0"], "--concurrency"),
        (["--concurrency=1", "--rate=5"], "--rate"),
        (["--rate=5", "--arrivals=gamma"], "--arrivals"),
        (["--shape=huge"], "--shape"),
        (["--model=mine"], "--model"),
        (["--csv=/no/such/folder/file"], "--csv"),
        (["--tls-key=key.pem", "--target=127.0.0.1:1"], "tls"),
    ],
)
def test_wrong_use_is_exit_code_2_and_names_the_option(monkeypatch, flags: list[str], named: str) -> None:
    monkeypatch.delenv("GRADWIRE_TARGET", raising=False)
    outcome = load_test(*flags, quick=())
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"gradwire: {named}")


def test_service_that_is_not_there_is_exit_code_3() -> None:
    assert load_test("--target=127.0.0.1:1").exit_code == 3


def test_model_that_refuses_its_request_is_told_before_any_load(served) -> None:
    def refuse(request, context):
        raise FailedPrecondition("models/mine failed", reason="MODEL_FAILED")

    served.answers["ComputeGradients"] = refuse
    outcome = load_test("--target", served.target)
    assert outcome.exit_code == 1
    assert "models/mine failed" in outcome.stderr
    assert len(served.requests("ComputeGradients")) == len(served.requests("DeleteModel")) == 1


def test_model_whose_gradients_do_not_fit_one_message_is_wrong_use(served) -> None:
    def refuse(request, context):
        assert request.max_inline_bytes == 0
        raise InvalidArgument("too large", field="max_inline_bytes", reason="REPLY_TOO_LARGE")

    served.answers["ComputeGradients"] = refuse
    outcome = load_test("--target", served.target)
    assert (outcome.exit_code, len(served.requests("DeleteModel"))) == (2, 1)
    assert "--layers" in outcome.stderr
