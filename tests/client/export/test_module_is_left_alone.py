"""An export changes nothing of the user's: module, random state, modes of torch."""

from __future__ import annotations

import builtins
import random

import numpy as np
import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import ExportError


class Restless(nn.Module):
    """A module whose forward changes everything that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0
        self.history: list[float] = []
        self.cache: dict[str, int] = {}

    def forward(self, x):
        self.calls += 1
        self.history.append(1.0)
        self.cache["n"] = self.calls
        random.random()
        np.random.rand()
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_flags_buffers_attributes_and_random_state_come_back(training, fails):
    module = Restless()
    module.train(training)
    module.dropout.eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    objects = {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    flags = [each.training for each in module.modules()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if fails:
        with pytest.raises(ExportError):
            ModuleExporter(module).export_model(torch.randn(3, 5))
    else:
        torch.manual_seed(5)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        ModuleExporter(module, "mse").export_model(x, x)
        assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and (np.random.get_state()[1] == before[2]).all()
    assert flags == [each.training for each in module.modules()]
    assert objects == {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert module.calls == 0 and module.history == [] and module.cache == {}
    assert all(parameter.grad is None for parameter in module.parameters())
    assert builtins.len.__module__ == "builtins" and "training" not in vars(nn.Module)


def test_exporting_inside_no_grad_or_autocast_changes_nothing():
    module, x = nn.Linear(4, 4), torch.randn(3, 4)
    usual = ModuleExporter(module, "mse").export_model(x, x).program
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ModuleExporter(module, "mse").export_model(x, x).program == usual


def test_live_tensors_are_handed_out_without_copies():
    module = nn.Linear(4, 4)
    exported = ModuleExporter(module).export_model(torch.randn(3, 4))
    assert exported.tensors["weight"].data_ptr() == module.weight.data_ptr()
    assert not exported.tensors["weight"].requires_grad
