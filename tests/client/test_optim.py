"""Optimizer specs: torch's names, arguments and refusals."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch

from gradwire import errors, optim

LEFT_OUT = {"params", "foreach", "differentiable", "fused"}
"""How torch computes on one device, not what."""


def test_sgd_has_the_arguments_and_defaults_of_torch():
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(torch.optim.SGD).parameters.items()
        if name not in LEFT_OUT
    }
    ours = {field.name: field.default for field in dataclasses.fields(optim.SGD)}
    assert ours == theirs


def test_spec_carries_name_and_every_argument():
    spec = optim.SGD(lr=1, momentum=0.9, nesterov=True).spec()
    assert spec.name == "SGD"
    assert spec.options == {
        "lr": 1.0,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": True,
        "maximize": False,
    }


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"lr": -1.0}, "optimizer.lr"),
        ({"momentum": -0.5}, "optimizer.momentum"),
        ({"weight_decay": -1e-9}, "optimizer.weight_decay"),
        ({"nesterov": True}, "optimizer.nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "optimizer.nesterov"),
    ],
)
def test_argument_out_of_range_says_what_torch_says_and_names_the_field(arguments, field):
    with pytest.raises(ValueError) as theirs:
        torch.optim.SGD([torch.zeros(1)], **arguments)
    with pytest.raises(errors.InvalidArgument) as ours:
        optim.SGD(**arguments)
    assert str(theirs.value) in ours.value.message
    assert ours.value.field == field


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_argument_that_is_no_finite_number_is_refused(name, value):
    with pytest.raises(errors.InvalidArgument, match="finite number"):
        optim.SGD(**{name: value})


@pytest.mark.parametrize("name", ["nesterov", "maximize"])
def test_flag_that_is_no_bool_is_refused(name):
    with pytest.raises(errors.InvalidArgument, match="bool"):
        optim.SGD(**{"momentum": 0.9, name: 1})


def test_spec_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        optim.SGD(lr=0.1).lr = 0.2  # type: ignore[misc]
    with pytest.raises(TypeError):
        optim.SGD(0.1)  # type: ignore[misc]
