"""torch's own updates of a small module, for those of the ranks to be compared with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20
MOMENTUM = {"lr": 0.2, "momentum": 0.9}


class Layers(nn.Module):
    """Two matrices, one of them tied; `aside` has no gradient. Muon's parameters are matrices."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.aside = nn.Linear(4, 4, bias=bias), nn.Linear(4, 3, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(4, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tied(torch.tanh(self.first(x))))


def layers(optimizer: str = "SGD") -> Layers:
    return Layers(bias=optimizer != "Muon").double()


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.randn(rows, 2).double()


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(each) for name, each in module.named_parameters() if name != "aside.weight"}


class Local:
    """torch's own loop over a copy of the module, with the gradients that it is given."""

    def __init__(self, module: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.module = copy.deepcopy(module)
        self.optimizer = optimizer(self.module)
        self.schedule: Any = None

    def step(self, gradients: dict[str, Tensor]) -> float:
        for name, parameter in self.module.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        used = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if self.schedule is not None:
                self.schedule.step()
        return used


def close(found: dict[str, Tensor], module: nn.Module, tolerance: float = 1e-10) -> None:
    for name, expected in module.state_dict().items():
        distance = float((found[name] - expected).norm())
        assert distance <= tolerance * max(1.0, float(expected.norm())), f"{name} is off by {distance:.1e}"


def assert_same_bits(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype is expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_bits(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    else:
        assert found == expected
