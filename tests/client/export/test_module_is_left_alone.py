"""An export changes nothing of the user's: module, random state, modes of torch."""

from __future__ import annotations

import builtins
import copy
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
        self.draws = False
        self.history: list[float] = []
        self.cache: dict[str, int] = {}
        self.nested: dict[str, tuple[list, set]] = {"a": ([], set())}

    def forward(self, x):
        self.calls += 1
        self.nested["a"][0].append(x)
        self.nested["a"][1].add("seen")
        self.history.append(1.0)
        self.cache["n"] = self.calls
        if self.draws:
            random.random(), np.random.rand()
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", ["on the example", "by drawing", None])
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
        module.draws = fails == "by drawing"
        with pytest.raises(ExportError) as caught:
            ModuleExporter(module).export_model(torch.randn(3, 4 if module.draws else 5))
        assert caught.value.reason == ("EXPORT_PYTHON_RANDOM" if module.draws else "EXAMPLE_FAILED")
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
    assert module.calls == 0 and module.history == [] and module.cache == {} and module.nested == {"a": ([], set())}
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


class Averages(nn.Module):
    """Keeps a running mean in place, without detaching it, as its users' loops allow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.linear(x - self.mean)


def test_buffers_get_no_history_and_the_users_own_loop_runs_on():
    module = Averages()
    exporter = ModuleExporter(module, "mse")
    exporter.export_model(torch.randn(3, 4), torch.randn(3, 4))
    exporter.export_variant(torch.randn(5, 4), torch.randn(5, 4), training=True, name="another")
    assert not module.mean.requires_grad and module.mean.grad_fn is None and torch.equal(module.mean, torch.zeros(4))
    copy.deepcopy(module)
    for _ in range(2):
        module(torch.randn(3, 4)).sum().backward()


def test_parameters_that_a_forward_writes_come_back_from_every_run():
    class Clips(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    module = Clips(4, 4)
    before = module.weight.detach().clone()
    exporter = ModuleExporter(module)
    with pytest.raises(ExportError):
        exporter.export_model(torch.randn(3, 4))
    with pytest.raises(ExportError):
        exporter.export_variant(torch.randn(3, 5), training=True, name="another")
    assert torch.equal(module.weight, before)


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.calls, self.seen = 0, {"outputs": [[]]}

    def forward(self, outputs, targets):
        self.calls += 1
        self.seen["outputs"][0].append(outputs)
        return ((outputs - targets) ** 2 * self.scale).mean()


class MovingLoss(CountingLoss):
    def forward(self, outputs, targets):
        self.scale.mul_(0.9).add_(outputs.mean(0))
        return super().forward(outputs, targets)


def test_the_loss_module_comes_back_too():
    x = torch.randn(3, 4)
    loss = CountingLoss()
    ModuleExporter(nn.Linear(4, 4), loss).export_model(x, x)
    assert loss.calls == 0 and loss.seen == {"outputs": [[]]}
    loss = MovingLoss()
    with pytest.raises(ExportError, match="the loss changes a tensor"):
        ModuleExporter(nn.Linear(4, 4), loss).export_model(x, x)
    assert loss.calls == 0 and torch.equal(loss.scale, torch.ones(4)) and not loss.scale.requires_grad


def test_a_tensor_that_an_export_did_not_change_has_the_version_that_it_had():
    # A user's own graph from before still runs backward.
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval()), torch.randn(3, 4)
    loss = module(x).sum()
    exporter = ModuleExporter(module)
    exporter.export_model(x)
    exporter.export_variant(torch.randn(3, 4), training=True, name="another")
    loss.backward()


def test_cuda_is_neither_started_nor_seeded_for_a_module_on_the_cpu(monkeypatch):
    def refused(*_):
        raise AssertionError("CUDA was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    ModuleExporter(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), "mse").export_model(
        torch.randn(3, 4), torch.randn(3, 4)
    )
