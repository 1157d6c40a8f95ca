"""What a forward keeps in Python cannot travel: nothing may depend on it. What nothing depends on does no harm."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire.functions import export_function
from gradwire_proto.errors import ExportError


class Steps(nn.Module):
    def __init__(self, forward, **attributes) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, self.linear(x))


def warm_up(m, h):
    m.step += 1
    return h * min(1.0, m.step / 1000)


def threshold(m, h):
    m.step += 1
    return h * (0.1 if m.step > 1000 else 1.0)


def every_tenth(m, h):
    m.step = (m.step + 1) % 10
    return h if m.step else h * 0.5


def in_a_dict(m, h):
    m.counts["step"] += 1
    return h * (2 if m.counts["step"] > 100 else 1)


def alternates(m, h):
    m.flag = not m.flag
    return h if m.flag else -h


def carries_over(m, h):
    m.last = h.detach() if m.last is None else 0.5 * m.last + 0.5 * h.detach()
    return h + m.last


def collects(m, h):
    m.seen.append(1.0)
    return h * len(m.seen)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: nn.Sequential(nn.Linear(4, 4), module)])
@pytest.mark.parametrize(
    ("function", "attributes"),
    [
        (warm_up, {"step": 0}),
        (threshold, {"step": 0}),
        (every_tenth, {"step": 3}),
        (in_a_dict, {"counts": {"step": 0}}),
        (alternates, {"flag": False}),
        (carries_over, {"last": None}),
        (collects, {"seen": []}),
    ],
)
def test_an_attribute_that_the_forward_changes_and_uses_is_refused_by_name(function, attributes, wrap):
    module = Steps(function, **attributes)
    with pytest.raises(ExportError) as caught:
        ModuleExporter(wrap(module)).export_model(torch.randn(3, 4))
    (name,) = attributes
    assert caught.value.reason == "EXPORT_PYTHON_STATE" and caught.value.field.rpartition(".")[2] == name
    assert "buffer" in str(caught.value)
    assert getattr(module, name) == {"step": 0, "counts": {"step": 0}, "flag": False, "last": None, "seen": []}.get(
        name
    ) or (function is every_tenth and module.step == 3)


def counts(m, h):
    m.step += 1
    m.history.append(m.step)
    return h


def remembers(m, h):
    m.last, m.rows = h, h.shape[0]
    return h


def settles(m, h):
    if not m.ready:
        m.table, m.ready = torch.arange(4.0), True
    return h + m.table


def caches(m, h):
    if m.length < h.shape[1]:
        m.cache["table"], m.length = torch.arange(4.0), h.shape[1]
    return h + m.cache["table"]


@pytest.mark.parametrize(
    ("function", "attributes"),
    [
        (counts, {"step": 0, "history": []}),
        (remembers, {"last": None, "rows": 0}),
        (settles, {"ready": False, "table": None}),
        (caches, {"length": -1, "cache": {}}),
    ],
)
def test_an_attribute_on_which_nothing_depends_does_no_harm(function, attributes):
    module = Steps(function, **attributes)
    exporter = ModuleExporter(module)
    exporter.export_model(torch.randn(3, 4))
    module(torch.randn(3, 4))
    # Nor does it make the module another one.
    exporter.export_variant(torch.randn(5, 4), training=True, name="another")


def test_a_counter_of_the_loss_is_no_other():
    class Ramp(nn.Module):
        step = 0

        def forward(self, outputs, targets):
            self.step += 1
            return (outputs - targets).square().mean() * self.step

    loss = Ramp()
    loss.step = 0
    with pytest.raises(ExportError) as caught:
        ModuleExporter(nn.Linear(4, 4), loss).export_model(torch.randn(3, 4), torch.randn(3, 4))
    assert caught.value.reason == "EXPORT_PYTHON_STATE" and caught.value.field == "loss.step"


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: np.random.randn(1)[0]])
def test_pythons_random_numbers_are_refused(draw):
    np.random.seed(0), np.random.randn(1)
    module = Steps(lambda m, h: h * (1 if draw() < 2 else 0))
    for export in (
        lambda: ModuleExporter(module).export_model(torch.randn(3, 4)),
        lambda: export_function(lambda x: x.sum() * (1 if draw() < 9 else 0), (torch.ones(3),)),
    ):
        with pytest.raises(ExportError) as caught:
            export()
        assert caught.value.reason == "EXPORT_PYTHON_RANDOM" and "random" in str(caught.value)
