"""The fingerprint of a function: the same for the same, another as soon as anything that it reads changes."""

from __future__ import annotations

import functools
import gc
import threading
import types
import weakref

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
