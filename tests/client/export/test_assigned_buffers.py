"""A buffer moves on the service as it does here, however the forward writes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire.exporting import safety_net
from gradwire_proto.errors import ExportError
from gradwire_workers.programs import build_program


class Average(nn.Module):
    """Running statistics that are assigned, not changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("n", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.n = self.n + 1
        return self.linear(x - self.mean) / (1 + self.n)


class Swap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("one", torch.randn(4))
        self.register_buffer("two", torch.randn(4))

    def forward(self, x):
        self.one, self.two = self.two, self.one + x.mean()
        return self.linear(x) * self.one


class Through(nn.Module):
    """Writes a buffer through a way of its own, and one that is not contiguous in place."""

    def __init__(self, write) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(4, 4), write
        self.register_buffer("kept", torch.randn(4, 4).t())

    def forward(self, x):
        self.write(self, x)
        return self.linear(x) + self.kept[0]


def nested() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Average(), nn.Sequential(Average(), Swap()))


@pytest.mark.parametrize(
    "make",
    [
        Average,
        Swap,
        nested,
        lambda: nn.Sequential(shared := Average(), nn.Tanh(), shared),
        lambda: Through(lambda m, x: setattr(m, "kept", m.kept * 0.9 + x.mean())),
        lambda: Through(lambda m, x: m.kept.mul_(0.9).add_(x.detach().mean())),
        lambda: Through(lambda m, x: setattr(m, "kept", m.kept.mul_(0.9) + m.kept.add_(0.1 * x.detach().mean()))),
        lambda: Through(lambda m, x: setattr(m, "kept", torch.ones(4, 4) * x.mean())),
        lambda: Through(lambda m, x: m._buffers.update(kept=m.kept + 1)),
        lambda: Through(lambda m, x: m.register_buffer("kept", m.kept + 1)),
    ],
)
def test_many_steps_move_every_buffer_as_eager_does(make):
    module = make()
    exported = ModuleExporter(module).export_model(torch.randn(3, 4))
    built = build_program(exported.program, {name: t.clone().contiguous() for name, t in exported.tensors.items()})
    for step in range(5):
        x = torch.randn(2 + step, 4)
        for training in (True, True, False):
            module.train(training)
            torch.testing.assert_close(module(x), built("train" if training else "eval", x)[0])
    held = built.all_state()
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, held[name])


def test_an_old_value_that_is_returned_stays_old():
    class Returns(Average):
        def forward(self, x):
            old = self.mean
            self.mean = self.mean + x.mean(0)
            return self.linear(x), old, self.mean

    module = nn.Sequential(Returns())
    exported = ModuleExporter(module).export_model(torch.randn(3, 4))
    built = build_program(exported.program, {name: t.clone() for name, t in exported.tensors.items()})
    for _ in range(3):
        x = torch.randn(5, 4)
        torch.testing.assert_close(list(module(x)), built("train", x))


@pytest.mark.parametrize("value", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), None])
def test_a_buffer_that_becomes_something_else_is_refused_by_name(value):
    def write(module, x):
        module.kept = value

    with pytest.raises(ExportError) as caught:
        ModuleExporter(nn.Sequential(Through(write))).export_model(torch.randn(3, 4))
    assert caught.value.reason in ("EXPORT_BUFFER_CHANGED", "EXAMPLE_FAILED")
    if caught.value.reason == "EXPORT_BUFFER_CHANGED":
        assert caught.value.field == "0.kept"


@pytest.mark.parametrize("factor", [2.0, 1.0 + 1e-5])
def test_a_buffer_that_the_graph_moves_otherwise_is_a_mismatch_that_names_it(factor):
    def write(module, x):
        module.kept.mul_(1.0 if torch.compiler.is_exporting() else factor)

    with pytest.raises(ExportError) as caught:
        ModuleExporter(nn.Sequential(Through(write))).export_model(torch.randn(3, 4))
    assert caught.value.reason == "EXPORT_MISMATCH"
    if factor < 2:
        assert caught.value.field == "0.kept"


def test_rounding_of_a_buffer_is_no_mismatch():
    before = torch.randn(100)
    moved = before + 1e-7
    runs = [
        safety_net.Run(outputs=[], loss=None, gradients={}, buffers={"b": value})
        for value in (moved, torch.nextafter(moved, torch.tensor(9.0)))
    ]
    safety_net.compare(*runs, {"b": before})
