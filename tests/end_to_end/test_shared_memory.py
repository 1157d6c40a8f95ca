"""Tensors through memory that both sides share are those that gRPC brings, bit for bit, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim

WIDTH = 1200
"""A layer of so many to so many: more bytes than travel within a message."""

MORTAL = "storage-of-the-sharing"


@pytest.fixture(scope="module")
def streaming(service: str) -> Iterator[gradwire.Client]:
    """A client of the same service that shares no memory with it."""
    with gradwire.connect(service, shared_memory=False) as client:
        yield client


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))


def batch(seed: int = 0, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 4, generator=generator)


def made(client: gradwire.Client, **settings: Any) -> gradwire.Model:
    return client.create_model(network(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=batch(), **settings)


def mapped_files() -> list[str]:
    """The service's files that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/gradwire-" in line]


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_shared_is_what_grpc_brings_and_what_torch_computes(client, streaming, workers):
    shared = made(client, workers=workers)
    streamed = streaming.get_model(shared.id)
    x, y = batch()
    found = shared.compute_gradients(x, y, input_gradients=True, outputs=True)
    assert mapped_files(), "nothing was shared"
    expected = streamed.compute_gradients(x, y, input_gradients=True, outputs=True)
    assert same(found.gradients, expected.gradients) and found.loss == expected.loss
    assert torch.equal(found.input_gradients, expected.input_gradients)
    assert torch.equal(found.outputs, expected.outputs)
    net = network()
    nn.functional.mse_loss(net(x), y).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad)
    weights = network(1).state_dict()
    shared.load_state_dict(weights)
    assert same(shared.state_dict(), weights) and same(streamed.state_dict(), weights)
    del found
    assert not mapped_files()


def test_results_that_are_kept_never_change_and_are_the_users_to_change(client, streaming):
    model, x, y = made(client), *batch()
    streamed = streaming.get_model(model.id)
    kept, copies = [], []
    for seed in range(4):
        model.load_state_dict(network(seed).state_dict())
        kept.append(dict(model.compute_gradients(x, y).gradients))
        copies.append(dict(streamed.compute_gradients(x, y).gradients))
        # And one whose file is written to again.
        model.compute_gradients(*batch(seed + 1))
    assert all(map(same, kept, copies))
    kept[0]["0.weight"].zero_()
    assert all(map(same, kept[1:], copies[1:])) and same(model.state_dict(), network(3).state_dict())


def test_fork_that_keeps_a_result_keeps_its_bytes(client):
    model, x, y = made(client), *batch()
    gradients = model.compute_gradients(x, y).gradients["0.weight"]
    expected = gradients.clone()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0 if gradients.numpy().tobytes() == expected.numpy().tobytes() else 1)
        finally:
            os._exit(2)
    del gradients
    for seed in range(1, 4):
        model.compute_gradients(*batch(seed))
    os.close(writer)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


CLIENT = """
import sys, time, torch
sys.path[:0] = sys.argv[2].split(":")
import gradwire
from gradwire.deadline import Deadline
from gradwire_proto.tensors import from_torch
client = gradwire.connect(sys.argv[1])
(info,) = [model for model in client.list_models() if model.id == "watched"]
kept = [client.get_model("watched").state_dict() for _ in range(3)]
assert client._rpc.local.upload("3d6f0a3e-6f0b-4a0e-9f53-0d6a6a3a0001", [from_torch(torch.zeros(1 << 20))], Deadline(9))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_client_that_is_killed_leaves_nothing_open_and_no_file(client, frontend_pid):
    made(client, model_id="watched")
    files = Path(f"/proc/{frontend_pid}/fd")

    def sockets_and_memory() -> int:
        links = [os.readlink(each) for each in files.iterdir() if each.exists()]
        return sum(link.startswith(("socket:", "/memfd:gradwire")) for link in links)

    before = sockets_and_memory()
    command = [sys.executable, "-c", CLIENT, client.target, ":".join(sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert sockets_and_memory() > before
        lent = [line.split()[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
        lent = [Path(path) for path in lent if path.endswith(".lent")]
        assert len(lent) >= 3 and all(path.exists() for path in lent)
        process.kill()
    deadline = time.monotonic() + 20
    while any(path.exists() for path in lent):
        assert time.monotonic() < deadline, "its files are still there"
        time.sleep(0.1)
    # The upload that nobody has used is kept for a while, as every other.
    assert sockets_and_memory() <= before + 1


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Client]:
    """A client of a service whose processes may be killed."""
    with gradwire.launch(workers=2, spare_ranks=1, storage=tmp_path_factory.mktemp(MORTAL), timeout=120) as client:
        yield client


def processes(word: str) -> list[psutil.Process]:
    (service,) = [each for each in psutil.Process().children() if MORTAL in " ".join(each.cmdline())]
    found = []
    for process in service.children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def trained(model: gradwire.Model, disturb: Callable[[int], None] = lambda _: None) -> list[Any]:
    """What commands and reads answered that bring and fetch more than a message holds."""
    answers: list[Any] = []
    for number in range(5):
        disturb(number)
        model.load_state_dict(network(number).state_dict())
        answers.append(model.train_step(*batch(number, rows=301)).loss)
        answers.append({name: each.clone() for name, each in model.compute_gradients(*batch(9)).gradients.items()})
        # 6 MiB of inputs: a command whose upload the journal keeps.
        answers.append(model.train_step(*batch(number, rows=1300)).loss)
    return [*answers, dict(model.state_dict())]


def equal(first: Any, second: Any) -> bool:
    return same(first, second) if isinstance(first, dict) else first == second


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gradwire_server.main", "RankActor"])
def test_a_killed_process_of_the_service_costs_no_bit(mortal, victim):
    calm = made(mortal)
    expected = trained(calm)
    calm.delete()
    model = made(mortal)

    def disturb(number: int) -> None:
        if number in (1, 3):
            # The rank that serves, not one that waits.
            pid = max(processes(victim), key=lambda each: each.cpu_times().user).pid
            threading.Timer(0.01 * number, os.kill, (pid, signal.SIGKILL)).start()

    found = trained(model, disturb)
    assert [index for index, pair in enumerate(zip(found, expected, strict=True)) if not equal(*pair)] == []
    model.delete()
    deadline = time.monotonic() + 10
    while not mortal._rpc.local.is_connected:
        assert time.monotonic() < deadline, "memory is not shared again"
        time.sleep(0.05)
        mortal.server_info()
