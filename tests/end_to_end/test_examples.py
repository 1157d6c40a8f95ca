"""Every example runs as its reader would run it, and prints the reference's numbers."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "client/examples"

PRINTS = {
    "sum_of_squares": ["out    7.0", "grad_x [[4.0, -2.0], [2.0, 2.0]]"],
    "quadratic": ["out    25.0", "grad_x 10.0"],
    "feed_forward": [
        "loss 0.3613",
        "grad W0 [[-0.0446, 0.0524, 0.0337], [-0.0446, 0.0524, 0.0337]]",
        "grad W1 [-0.0891, 0.1049, 0.0675]",
        "grad W2 [[-0.7040], [-0.6068], [-0.5387]]",
        "grad W3 [-1.2021]",
        "updated W0 [[0.0393, -0.6344, -0.3060], [0.4239, -0.5728, 0.1559]]",
        "updated W1 [0.0751, 0.4558, -0.1303]",
        "updated W2 [[0.8568], [0.4323], [0.4252]]",
        "updated W3 [0.6505]",
    ],
    "plain_loop": ["weights agree to 1e-5"],
    "custom_autograd_function": ["grad_x [4.0]", "grad_x of another backward [60.0]"],
    "thermometer_gradient": ["loss 1763.8848", "grad 4517.2969 82.6000"],
}


@pytest.fixture
def run(service, monkeypatch, capsys) -> Iterator[Callable[[str], str]]:
    """Runs an example as a program, in this process: to import torch anew takes longer than all that it does."""

    def run(name: str) -> str:
        monkeypatch.setenv("GRADWIRE_TARGET", service)
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    sys.modules.pop("service", None)


@pytest.mark.parametrize("name", PRINTS)
def test_example_prints_the_numbers_of_its_reference(name, run):
    printed = run(name)
    for line in PRINTS[name]:
        assert line in printed


def test_example_runs_by_itself(service):
    answer = subprocess.run(
        [sys.executable, str(EXAMPLES / "quadratic.py")],
        env={**os.environ, "GRADWIRE_TARGET": service, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == PRINTS["quadratic"]


def test_linear_regression_agrees_with_local_torch(run):
    printed = run("linear_regression_one_point")
    pairs = re.findall(r"^(\w+) +(-?[\d.]+) +(-?[\d.]+)$", printed, re.MULTILINE)
    assert [name for name, _, _ in pairs] == ["loss", "weight", "bias", "x"]
    for _, remote, local in pairs:
        assert float(remote) == pytest.approx(float(local), abs=2e-6)


def test_mlp_agrees_with_local_torch(run):
    printed = run("mlp")
    differences = dict(re.findall(r"^(\S+) .* largest difference from local torch (\S+)$", printed, re.MULTILINE))
    assert list(differences) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(float(difference) < 1e-6 for difference in differences.values())


def test_sgd_line_agrees_with_local_torch_and_finds_the_line(run):
    printed = run("sgd_line")
    w, b, local_w, local_b = map(float, re.findall(r"\b[wb] (-?\d+\.\d+)", printed))
    assert (w, b) == pytest.approx((local_w, local_b), abs=2e-4)
    assert (w, b) == pytest.approx((-5, 0), abs=0.2)


@pytest.mark.slow
def test_thermometer_training_prints_the_losses_and_gradients_of_its_reference(run):
    printed = run("thermometer_training")
    losses = {
        int(epoch): float(loss) for epoch, loss in re.findall(r"^epoch (\d+) .* loss (\S+)$", printed, re.MULTILINE)
    }
    reference = [7.860116, 3.828538, 3.092191, 2.957697, 2.933134, 2.928648, 2.927830, 2.927679, 2.927652, 2.927647]
    assert losses == pytest.approx(dict(zip(range(500, 5001, 500), reference, strict=True)), abs=1e-5)
    gradients = {
        int(epoch): [float(w), float(b)]
        for epoch, w, b in re.findall(r"^epoch (\d+) grad (\S+) (\S+)", printed, re.MULTILINE)
    }
    for epoch, gradient in {500: [-0.2252, 1.2748], 1000: [-0.0962, 0.5448]}.items():
        assert gradients[epoch] == pytest.approx(gradient, abs=1e-4)
    assert "params 5.3671 -17.3012" in printed


def test_every_example_is_tested():
    tested_apart = {"linear_regression_one_point", "mlp", "sgd_line", "thermometer_training"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"service"} == set(PRINTS) | tested_apart
