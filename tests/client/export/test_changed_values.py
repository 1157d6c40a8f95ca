"""What a module or a loss reads in Python is baked in: a later variant finds it as it was, or is none."""

from __future__ import annotations

import functools
import logging
import time
import types
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire.exporting.read_values import ReadValues
from gradwire_proto.errors import FailedPrecondition

G = {"k": 1.0}
RATE = 2.0
TABLE = torch.ones(4)
LIMITS = types.SimpleNamespace(top=1.0)
LOG = logging.getLogger("losses")
CACHE: dict[int, torch.Tensor] = {}
COUNTS = {"forwards": 0}


class Settings:
    rate = 1.0
    made = 0

    def __init__(self) -> None:
        self.power, self.unread = 2, 0
        Settings.made += 1


@dataclass
class Options:
    scale: float = 1.0
    more: list[float] = field(default_factory=lambda: [1.0])


SETTINGS = Settings()


def helper(x):
    return x * RATE


class ReadsGlobals(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.options = Options()
        self.activation = lambda x: x * G["k"]

    def forward(self, x, times=[1.0]):  # noqa: B006
        LOG.debug("forward")
        x = self.activation(self.linear(x)) * times[0] + TABLE
        return self.scaled(helper(x) * SETTINGS.rate**SETTINGS.power * LIMITS.top)

    @torch.no_grad()
    def scaled(self, x):
        options = self.options
        return x * self.options.scale * self.factor * options.more[0] + Settings().power


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(ReadsGlobals())

    def forward(self, x):
        return self.inner(x)


@pytest.fixture(autouse=True)
def as_they_were(monkeypatch):
    for name, value in {
        "G": {"k": 1.0},
        "RATE": 2.0,
        "TABLE": torch.ones(4),
        "LIMITS": types.SimpleNamespace(top=1.0),
        "SETTINGS": Settings(),
    }.items():
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(Settings, "rate", 1.0)
    monkeypatch.setattr(ReadsGlobals, "factor", 1.0)
    monkeypatch.setattr(ReadsGlobals.forward, "__defaults__", ([1.0],))


def exporter_of(module, loss=None):
    exporter = ModuleExporter(module, loss)
    exporter.export_model(torch.randn(5, 4), torch.randn(5, 4) if loss else None)
    return exporter


def another(exporter, *, targets=False):
    shape = (3, 2, 4)
    return exporter.export_variant(
        torch.randn(shape), torch.randn(shape) if targets else None, training=True, name="another"
    )


def refused(exporter, *, targets=False):
    with pytest.raises(FailedPrecondition) as caught:
        another(exporter, targets=targets)
    assert caught.value.reason == "MODULE_CHANGED"
    return caught.value.message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: G.update(k=7.0), "'G', which <lambda> reads, is not"),
        (lambda m: globals().update(RATE=5.0), "'RATE', which helper reads, is not what it was"),
        (lambda m: globals().update(helper=lambda x: x), "'helper', which ReadsGlobals.forward reads"),
        (lambda m: TABLE.add_(1), "'TABLE'"),
        (lambda m: TABLE.numpy().fill(7), "'TABLE'"),
        (lambda m: globals().update(TABLE=torch.zeros(4)), "'TABLE'"),
        (lambda m: setattr(LIMITS, "top", 3.0), "'LIMITS.top'"),
        (
            lambda m: setattr(SETTINGS, "power", 3),
            "'SETTINGS.power', which ReadsGlobals.forward reads, .*: 2 then, 3 now",
        ),
        (lambda m: setattr(SETTINGS, "rate", 3.0), "'SETTINGS.rate'.*: 1.0 then, 3.0 now"),
        (lambda m: setattr(Settings, "rate", 3.0), "'SETTINGS.rate'"),
        (lambda m: setattr(ReadsGlobals, "factor", 3.0), "'self.factor', which ReadsGlobals.scaled reads"),
        (lambda m: setattr(m.inner[0].options, "scale", 3.0), "attribute 'scale' of Options.*: 1.0 then, 3.0 now"),
        (lambda m: m.inner[0].options.more.append(3.0), "attribute 'more' of Options"),
        (
            lambda m: ReadsGlobals.forward.__defaults__[0].insert(0, 3.0),
            "the default of 'times' in ReadsGlobals.forward",
        ),
    ],
)
def test_a_value_that_a_forward_reads_is_what_it_was_or_named(change, named):
    module = Outer()
    exporter = exporter_of(module)
    another(exporter)
    change(module)
    with pytest.raises(FailedPrecondition, match=named) as caught:
        another(exporter)
    assert caught.value.reason == "MODULE_CHANGED"


def test_a_value_that_a_loss_closes_over_is_what_it_was_or_named():
    alpha, table = [1.0], torch.ones(4)
    exporter = exporter_of(nn.Linear(4, 4), lambda o, t: ((o - t) ** 2 * alpha[0] * table).mean())
    another(exporter, targets=True)
    alpha[0] = 5.0
    assert "'alpha', which <lambda> reads," in refused(exporter, targets=True)
    alpha[0] = 1.0
    another(exporter, targets=True)
    table.mul_(2)
    assert "'table', which <lambda> reads," in refused(exporter, targets=True)


def test_arguments_of_a_partial_loss_are_what_they_were():
    weights = [1.0]
    loss = functools.partial(lambda weights, o, t, power: ((o - t) ** power * weights[0]).mean(), weights, power=2)
    exporter = exporter_of(nn.Linear(4, 4), loss)
    another(exporter, targets=True)
    weights[0] = 2.0
    assert "the loss is not what it was" in refused(exporter, targets=True)
    weights[0] = 1.0
    loss.keywords["power"] = 4
    assert "the loss is not what it was" in refused(exporter, targets=True)


class Trainer:
    def __init__(self) -> None:
        self.alpha, self.step = 1.0, 0

    def loss(self, outputs, targets):
        return self.weighted((outputs - targets) ** 2).mean()

    def weighted(self, error):
        return error * self.alpha

    __call__ = loss


@pytest.mark.parametrize("of", [lambda trainer: trainer.loss, lambda trainer: trainer])
def test_a_loss_with_an_owner_is_held_to_what_it_reads_of_it(of):
    trainer = Trainer()
    exporter = exporter_of(nn.Linear(4, 4), trainer.loss)
    trainer.step, trainer.model = 1, exporter
    another(exporter, targets=True)
    trainer.alpha = 2.0
    assert "'self.alpha', which Trainer.weighted reads, is not" in refused(exporter, targets=True)


def test_another_network_that_a_loss_asks_is_what_it_was():
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    exporter = exporter_of(nn.Linear(4, 4), lambda o, t: (o - teacher(t)).square().mean())
    another(exporter, targets=True)
    with torch.no_grad():
        teacher[0].weight.mul_(2)
    assert "'_parameters' of Linear" in refused(exporter, targets=True)


def test_what_did_not_change_is_not_taken_for_a_change():
    module = Outer()
    networks, weights = [module], [module.inner[0].linear.weight]
    exporter = exporter_of(
        module, lambda o, t: (o - t).square().mean() * len(str(module)) * len(networks[:1]) * len(weights[:1])
    )
    # Equal values, values that nobody reads, and the model's own weights.
    globals().update(G={"k": 1.0}, RATE=2.0, TABLE=torch.ones(4), SETTINGS=Settings())
    SETTINGS.unread, SETTINGS.added = 7, 8
    LOG.setLevel(logging.ERROR)
    ReadsGlobals.unread = 3
    module.eval()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    with torch.no_grad():
        module.inner[0].linear.weight.mul_(2)
    another(exporter, targets=True)


class Counts(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.count = nn.Linear(4, 4), Settings(), 0

    def forward(self, x):
        COUNTS["forwards"] += 1
        Counts.calls = self.calls + 1
        self.seen.unread += 1
        self.count += 1
        if x.dim() not in CACHE:
            CACHE[x.dim()] = torch.ones(4)
        return self.linear(x) + CACHE[x.dim()]


def test_what_forwards_change_themselves_is_no_change():
    module = Counts()
    networks = [module]
    module(torch.randn(2, 4))
    exporter = exporter_of(module, lambda o, t: (o - t).square().mean() * len(networks[:1]))
    module(torch.randn(2, 4))
    another(exporter, targets=True)
    module(torch.randn(2, 4))
    exporter.export_variant(torch.randn(2, 2, 2, 4), torch.randn(2, 2, 2, 4), training=True, name="third")


class Hostile:
    def __getattribute__(self, name):
        raise RuntimeError("not to be looked at")

    def __eq__(self, other):
        raise RuntimeError("not to be compared")

    __hash__ = None


def test_objects_that_cannot_be_looked_into_stand_in_nobodys_way():
    hostile, many, deep = Hostile(), list(range(5_000)), []
    for _ in range(10_000):
        deep = [deep]

    def loss(o, t):
        import math

        return (o - t).square().mean() * math.sqrt(len(many)) * (0 if hostile is None else 1) * len(deep)

    exporter = exporter_of(nn.Linear(4, 4), loss)
    another(exporter, targets=True)
    many = list(range(5_000))
    assert "'many', which loss reads," in refused(exporter, targets=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.options = Options()

    def forward(self, x):
        return x + self.down(torch.tanh(helper(self.up(self.norm(x))) * self.options.scale))


def test_reading_the_values_of_a_deep_module_takes_no_time():
    module = nn.Sequential(*(Block() for _ in range(40)))
    ReadValues([module], None)
    seconds = []
    for _ in range(3):  # a garbage collection may fall into one
        start = time.thread_time()
        ReadValues([module], None).hold()
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.1
