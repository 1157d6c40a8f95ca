"""The fingerprint of a function: the same for the same, another as soon as anything that it reads changes."""

from __future__ import annotations

import collections
import functools
import gc
import os
import random
import sys
import threading
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from gradwire.captured import Unknown, fingerprint

RATE = 2.0


def scaled(x):
    return x * RATE


def calls_a_helper(w):
    return scaled(w).sum()


class Settings:
    limit = 3

    def __init__(self, factor):
        self.factor = factor

    def loss(self, w):
        return (w * self.factor).sum() * self.limit


def of_closure(value):
    return lambda w: (w * value).sum()


def test_same_code_over_equal_values_has_the_same_fingerprint():
    tensor = torch.randn(3)
    assert fingerprint(of_closure(tensor)) == fingerprint(of_closure(tensor.clone()))
    assert hash(fingerprint(of_closure(tensor))) == hash(fingerprint(of_closure(tensor.clone())))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (2, 3),
        (2, 2.0),
        (1, True),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.ones(4), torch.ones(2, 2)),
        (np.ones(3), np.zeros(3)),
        ([1, 2], [1, 3]),
        ([1, 2], (1, 2)),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}),
        ({1, 2}, {1, 3}),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (scaled, calls_a_helper),
        (torch.sin, torch.cos),
        (functools.partial(scaled, 1), functools.partial(scaled, 2)),
        (torch.float32, torch.float64),
    ],
)
def test_another_value_is_another_fingerprint(one, other):
    assert fingerprint(of_closure(one)) == fingerprint(of_closure(one))
    assert fingerprint(of_closure(one)) != fingerprint(of_closure(other))


def test_another_place_in_the_code_is_another_fingerprint():
    assert fingerprint(lambda w: w.sum()) != fingerprint(lambda w: w.mean())


@pytest.mark.parametrize("change", [lambda t: t.add_(1), lambda t: t.data.add_(1), lambda t: t.numpy().fill(7)])
def test_tensor_changed_in_place_is_noticed_however_it_was_changed(change):
    tensor = torch.ones(3)
    function = of_closure(tensor)
    before = fingerprint(function)
    change(tensor)
    assert fingerprint(function) != before


def test_globals_of_helpers_count(monkeypatch):
    before = fingerprint(calls_a_helper)
    monkeypatch.setitem(globals(), "RATE", 5.0)
    assert fingerprint(calls_a_helper) != before


def test_attributes_of_instances_classes_and_modules_count(monkeypatch):
    settings = Settings(2.0)
    before = fingerprint(settings.loss)
    settings.factor = 3.0
    changed = fingerprint(settings.loss)
    assert changed != before
    monkeypatch.setattr(Settings, "limit", 4)
    assert fingerprint(settings.loss) != changed
    settings_module = types.ModuleType("settings_of_the_user")
    settings_module.rate = 1.0
    monkeypatch.setitem(globals(), "settings_module", settings_module)
    function = eval("lambda w: w.sum() * settings_module.rate", globals())
    before = fingerprint(function)
    settings_module.rate = 2.0
    assert fingerprint(function) != before


@dataclass(frozen=True)
class Options:
    scale: float = 1.0


class Holds:
    options = Options()

    def loss(self, w):
        return (w * self.options.scale).sum()


class Computes:
    @property
    def rate(self):
        return RATE

    def __call__(self, w):
        return (w * self.rate).sum()


class Slotted:
    __slots__ = ("rate",)


class BelowSlotted(Slotted):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = 2.0

    def forward(self, x):
        return torch.nn.functional.relu(self.linear(x)) * self.scale


@pytest.fixture
def settings(monkeypatch):
    """A module of the user's in a package of the user's, both to be imported."""
    settings, package = types.ModuleType("users_settings"), types.ModuleType("users_package")
    settings.rate, package.settings = 1.0, settings
    monkeypatch.setitem(sys.modules, "users_settings", settings)
    monkeypatch.setitem(sys.modules, "users_package", package)
    monkeypatch.setitem(globals(), "users_settings", settings)
    monkeypatch.setitem(globals(), "users_package", package)
    return settings


def of_cell(module):
    return lambda w: (w * module.rate).sum()


@pytest.mark.parametrize(
    "function",
    [
        lambda w: (w * users_settings.rate).sum(),  # noqa: F821 - the fixture's
        lambda w: (w * users_package.settings.rate).sum(),  # noqa: F821
        lambda w: [v * users_settings.rate for v in w],  # noqa: F821
    ],
    ids=["module", "module of a package", "inside a comprehension"],
)
def test_attributes_of_modules_count(settings, function):
    before = fingerprint(function)
    assert fingerprint(function) == before
    settings.rate = 2.0
    assert fingerprint(function) != before


def test_attributes_of_modules_in_closures_count(settings):
    before = fingerprint(of_cell(settings))
    settings.rate = 2.0
    assert fingerprint(of_cell(settings)) != before


def test_what_properties_and_calls_of_instances_read_counts(monkeypatch):
    before = fingerprint(Computes())
    assert fingerprint(Computes()) == before
    monkeypatch.setitem(globals(), "RATE", 7.0)
    assert fingerprint(Computes()) != before


def test_instances_among_the_attributes_of_a_class_count(monkeypatch):
    before = fingerprint(Holds().loss)
    assert fingerprint(Holds().loss) == before
    monkeypatch.setattr(Holds, "options", Options(scale=3.0))
    assert fingerprint(Holds().loss) != before


def test_functions_that_torch_wraps_count():
    wrapped = [torch.func.grad(of_closure(value)) for value in (1.0, 1.0, 2.0)]
    assert fingerprint(wrapped[0]) == fingerprint(wrapped[1]) != fingerprint(wrapped[2])


def test_a_module_of_the_user_s_is_known_whole():
    torch.manual_seed(0)
    net = Net()
    before = fingerprint(lambda x: net(x).sum())
    assert before
    net.scale = 3.0
    first, second = fingerprint(of_closure(net)), fingerprint(of_closure(net))
    net.scale = 2.0
    assert first == second != fingerprint(of_closure(net))


def imports_inside(w):
    import users_settings  # pyright: ignore[reportMissingImports]

    return (w * users_settings.rate).sum()


def takes_a_name_inside(w):
    from users_settings import rate  # pyright: ignore[reportMissingImports]

    return (w * rate).sum()


def passes_a_module_on(w):
    return of_cell(users_settings)(w)  # noqa: F821


def gets_an_attribute_by_name(w):
    return (w * getattr(users_settings, "rate")).sum()  # noqa: B009, F821


def looks_into_the_globals(w):
    return (w * globals()["RATE"]).sum()


def looks_into_the_globals_of_another(w):
    return (w * scaled.__globals__["RATE"]).sum()


@functools.lru_cache
def cached_rate():
    return RATE


@functools.singledispatch
def dispatched(w):
    return w.sum()


@functools.wraps(nn.functional.relu)
def in_disguise(w):
    return (w * globals()["RATE"]).sum()


def slotted():
    value = BelowSlotted()
    value.rate = 1.0
    return value


class Mapping(dict):
    pass


@pytest.mark.parametrize(
    "function",
    [
        imports_inside,
        takes_a_name_inside,
        passes_a_module_on,
        gets_an_attribute_by_name,
        looks_into_the_globals,
        looks_into_the_globals_of_another,
        lambda w: (w * cached_rate()).sum(),
        lambda w: dispatched(w),
        in_disguise,
        lambda w: w.sum() * random.random(),
        lambda w: w.sum() * np.random.rand(),
        lambda w: w.sum() * float(os.environ["RATE"]),
        lambda w: torch.load("weights.pt") * w,
        lambda w: eval("RATE") * w,
        lambda w: not_bound_anywhere * w,  # noqa: F821
        of_closure(slotted()),
        of_closure(Mapping(rate=1.0)),
        of_closure(collections.deque([1.0])),
        of_closure(torch.eye(2).to_sparse()),
        of_closure(np.array([object()])),
    ],
)
def test_what_may_read_more_than_can_be_seen_is_unknown(settings, function):
    with pytest.raises(Unknown):
        fingerprint(function)


def test_a_module_as_a_default_argument_is_unknown(settings):
    def with_default(w, config=settings):
        return (w * config.rate).sum()

    with pytest.raises(Unknown):
        fingerprint(with_default)


def test_elements_of_tensor_arguments_do_not_count_and_all_else_does():
    def key(*args):
        return fingerprint(scaled, args)

    assert key(torch.zeros(3)) == key(torch.ones(3)) != key(torch.ones(4))
    assert key({"a": np.zeros(3)}) == key({"a": np.ones(3)}) != key({"b": np.ones(3)})
    assert key(torch.zeros(3)) != key(torch.zeros(3, dtype=torch.float64)) != key(np.zeros(3))
    assert key(np.float64(2.0)) == key(np.float64(2.0)) != key(np.float64(3.0))
    assert key(Settings(1.0)) == key(Settings(1.0)) != key(Settings(2.0))
    assert key((torch.ones(2), 3)) != key([torch.ones(2), 3]) != key([torch.ones(2), 4])


def test_mode_and_weights_of_a_module_count():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    function = of_closure(module)
    before = fingerprint(function)
    module.eval()
    assert fingerprint(function) != before
    module.train()
    assert fingerprint(function) == before


def test_defaults_count():
    def with_default(value):
        def function(w, factor=value, *, power=value):
            return (w * factor).sum() ** power

        return function

    assert fingerprint(with_default(1)) == fingerprint(with_default(1))
    assert fingerprint(with_default(1)) != fingerprint(with_default(2))


def test_values_that_refer_to_themselves_end():
    value: list = [1]
    value.append(value)
    assert fingerprint(of_closure(value)) == fingerprint(of_closure(value))


def test_what_cannot_be_told_is_unknown():
    with pytest.raises(Unknown):
        fingerprint(of_closure(threading.Lock()))
    with pytest.raises(Unknown):
        fingerprint(of_closure(iter([1, 2])))


def test_fingerprint_keeps_nothing_of_the_user_s_alive():
    tensor, settings = torch.ones(1000), Settings(torch.ones(10))
    kept = fingerprint(of_closure((tensor, settings)))
    watches = [weakref.ref(tensor), weakref.ref(settings)]
    del tensor, settings
    gc.collect()
    assert [watch() for watch in watches] == [None, None]
    assert kept
