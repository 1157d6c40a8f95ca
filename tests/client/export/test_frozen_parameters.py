"""Which frozen parameters the exported graphs could train, were they unfrozen; and the module stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import ExportError


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class Scaled(nn.Module):
    """`shift` goes through plain operators, `scale` through a function with a backward of its own."""

    def __init__(self, *, wide_uses_function: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.counts = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        self.tied = self.shift
        self.wide_uses_function = wide_uses_function

    def forward(self, x: Tensor) -> Tensor:
        through = not self.wide_uses_function or x.dim() > 2
        scale = Doubling.apply(self.scale) if through else self.scale
        return self.linear(x) * scale + self.shift + self.counts  # type: ignore[operator]


def may_train(exporter: ModuleExporter) -> set[str]:
    exported = exporter.export_model(torch.randn(3, 4), torch.randn(3, 2))
    return {each.name for each in exported.program.tensors if each.may_train}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_those_whose_gradient_the_graphs_give_may_be_trained(precision: str) -> None:
    module = Scaled()
    assert may_train(ModuleExporter(module, nn.MSELoss(), precision)) == {"shift", "tied"}
    assert {name for name, each in module.named_parameters() if each.requires_grad} == {"linear.weight", "linear.bias"}


def test_a_parameter_without_a_derivative_stays_frozen() -> None:
    class Written(nn.Module):
        """In-place on a leaf: autograd refuses that once it requires a gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.counter = nn.Linear(4, 2), nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.counter.add_(1)
            return self.linear(x)

    assert may_train(ModuleExporter(Written(), nn.MSELoss())) == set()


def test_a_later_variant_that_does_not_give_a_promised_gradient_is_refused() -> None:
    exporter = ModuleExporter(Scaled(wide_uses_function=True), nn.MSELoss())
    assert may_train(exporter) == {"scale", "shift", "tied"}
    with pytest.raises(ExportError) as caught:
        exporter.export_variant(torch.randn(3, 5, 4), torch.randn(3, 5, 2), training=True, name="wide")
    assert (caught.value.reason, caught.value.field) == ("EXPORT_MISMATCH", "scale")
