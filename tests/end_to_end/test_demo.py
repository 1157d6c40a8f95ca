"""`gradwire demo`, as somebody would run it who has just installed gradwire."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gradwire import errors
from gradwire.demo import convolutional_network, require_packages


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_demo_learns_digits_and_leaves_a_curve_and_weights(tmp_path):
    program = Path(sysconfig.get_path("scripts")) / "gradwire"
    answer = subprocess.run([program, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (accuracy,) = re.findall(r"Held-out accuracy: ([\d.]+)%", answer.stdout)
    assert float(accuracy) >= 97.0
    assert (tmp_path / "gradwire-demo/loss.png").read_bytes().startswith(b"\x89PNG")
    convolutional_network().load_state_dict(torch.load(tmp_path / "gradwire-demo/weights.pt", weights_only=True))
    for part in ("queue", "transfer", "compute", "all_reduce", "optimizer"):
        assert re.search(rf"{part} .* \d+\.\d\d ", answer.stdout)
    assert "Traceback" not in answer.stderr


def test_demo_names_the_packages_that_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(errors.FailedPrecondition, match=r"scikit-learn.*gradwire\[demo\]") as refused:
        require_packages()
    assert refused.value.reason == "DEMO_NEEDS_PACKAGES"
