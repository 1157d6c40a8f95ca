"""The command line, as scripts use it: exit codes, stdout for results, stderr for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

import gradwire
from gradwire import optim
from gradwire.cli import app

GRADWIRE = [sys.executable, "-m", "gradwire.cli"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A fixed width, and no colours: what a script would see.
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run([*GRADWIRE, *arguments], capture_output=True, text=True, timeout=90, env=environment)


def invoke(*arguments: str) -> Result:
    """The same in this process, where all is imported already: its exit codes are those of the command."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["serve"],
        ["demo"],
        ["models"],
        ["models", "list"],
        ["models", "show"],
        ["models", "delete"],
        ["checkpoints"],
        ["checkpoints", "list"],
        ["checkpoints", "show"],
        ["checkpoints", "delete"],
        ["load-test"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    outcome = invoke(*command, "--help")
    assert outcome.exit_code == 0
    assert "Usage:" in outcome.stdout


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = "import sys, gradwire.cli; print(sorted({'torch', 'grpc', 'ray', 'numpy'} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert outcome.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["models", "show"], ["models", "lst"], ["checkpoints", "show"], ["demo", "--workers", "0"]]
)
def test_wrong_use_is_exit_code_2(arguments: list[str]) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr


def test_exit_code_and_streams_of_the_program_are_those_of_its_commands() -> None:
    wrong = run("models", "show")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "MODEL" in wrong.stderr


def test_a_service_that_is_not_there_is_exit_code_3_and_one_line() -> None:
    outcome = run("models", "list", "--target", "127.0.0.1:1")
    assert outcome.returncode == 3
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("gradwire: ")
    assert "127.0.0.1:1" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_models_can_be_listed_shown_and_deleted(client: gradwire.Client, service: str) -> None:
    import torch
    from torch import nn

    client.create_model(
        nn.Linear(3, 2),
        loss="mse_loss",
        optimizer=optim.SGD(
            lr=0.1,
            groups=[optim.ParamGroup("bias", lr=0.25)],
            schedule=optim.schedule.ChainedScheduler(schedulers=[optim.schedule.ExponentialLR(gamma=0.75)]),
        ),
        clip_grad_norm=1.5,
        example=(torch.randn(4, 3), torch.randn(4, 2)),
        model_id="linear-for-the-cli",
        labels={"team": "vision"},
    )

    def models(*arguments: str) -> Result:
        return invoke("models", *arguments, "--target", service)

    assert "linear-for-the-cli" in [model["id"] for model in json.loads(models("list", "--json").stdout)]
    assert "linear-for-the-cli" in models("list").stdout

    shown = json.loads(models("show", "linear-for-the-cli", "--json").stdout)
    assert (shown["num_parameters"], shown["optimizer"], shown["loss"]) == (8, "SGD", "mse_loss")
    assert shown["labels"] == {"team": "vision"}
    assert (shown["optimizer_options"]["lr"], shown["clip_grad_norm"]) == (0.1, 1.5)
    assert shown["parameter_groups"] == [{"pattern": "bias", "lr": 0.25}]
    assert shown["schedule"]["schedulers"][0]["gamma"] == 0.75
    table = models("show", "linear-for-the-cli").stdout
    for part in ("vision", "lr=0.25", "ChainedScheduler", "0.75", "1.5"):
        assert part in table

    assert models("delete", "linear-for-the-cli").exit_code == 0
    gone = models("show", "linear-for-the-cli")
    assert gone.exit_code == 4
    assert gone.stdout == ""
    assert "linear-for-the-cli" in gone.stderr


@pytest.mark.slow
def test_serve_prints_where_it_listens_and_drains_on_sigterm() -> None:
    arguments = ["serve", "--listen", "127.0.0.1:0", "--workers", "1", "--spare-ranks=0", "--log-level=warning"]
    with subprocess.Popen([*GRADWIRE, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("gradwire listening on 127.0.0.1:")
            assert invoke("models", "list", "--json", "--target", line.split()[-1]).stdout.strip() == "[]"
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--workers", "0"], "workers"), (["--listen", "0.0.0.0:50051"], "insecure"), (["--config", "/none"], "/none")],
)
def test_serve_with_wrong_settings_is_exit_code_2_and_names_the_setting(flags: list[str], named: str) -> None:
    outcome = run("serve", *flags)
    assert outcome.returncode == 2
    assert named in outcome.stderr


def test_serve_lists_every_setting() -> None:
    outcome = run("serve", "--all-settings")
    assert outcome.returncode == 0
    assert "--held-bytes" in outcome.stdout
    assert "--insecure-listen-anywhere" in outcome.stdout
