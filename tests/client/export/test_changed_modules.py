"""A later variant is one of the module as it was when the model was created, or none."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from gradwire.deadline import Deadline
from gradwire.export import ModuleExporter
from gradwire.variants import Variants
from gradwire_proto.errors import ExportError, FailedPrecondition
from gradwire_proto.tensors import from_nested
from gradwire_proto.values import Batch


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.scale, self.options, self.activation = 1.0, {"powers": [1, 2]}, torch.tanh
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        return (self.activation(self.norm(self.linear(x))) * self.scale + self.shift).reshape(4, -1)


def another(exporter):
    return exporter.export_variant(torch.randn(8, 4), training=True, name="another")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "scale", 5.0), "'scale'.*1.0 then, 5.0 now"),
        (lambda m: setattr(m, "scale", float("nan")), "'scale'"),
        (lambda m: m.options["powers"].append(3), "'options'"),
        (lambda m: setattr(m, "activation", torch.relu), "'activation'"),
        (lambda m: setattr(m, "added", 1), "'added'"),
        (lambda m: delattr(m, "scale") or setattr(type(m), "scale", 1.0), "'scale'"),
        (lambda m: m.linear.weight.requires_grad_(False), "parameter 'linear.weight'"),
        (lambda m: setattr(m.linear, "weight", nn.Parameter(torch.randn(4, 4))), "parameter 'linear.weight'"),
        (lambda m: setattr(m, "linear", nn.Linear(4, 4)), "'linear"),
        (lambda m: m.register_buffer("shift", torch.zeros(1)), "buffer 'shift'"),
        (lambda m: m.linear.register_forward_hook(lambda *_: None), "'linear._forward_hooks"),
        (lambda m: setattr(m.norm, "momentum", 0.5), "'norm.momentum'"),
    ],
)
def test_a_later_variant_of_a_changed_module_is_refused_with_what_changed(change, named):
    class Own(Scaled):
        pass

    module = Own()
    exporter = ModuleExporter(module)
    exporter.export_model(torch.randn(4, 4))
    change(module)
    with pytest.raises(FailedPrecondition, match=named) as caught:
        another(exporter)
    assert caught.value.reason == "MODULE_CHANGED"


def test_a_changed_loss_is_refused_too():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = 1.0

        def forward(self, outputs, targets):
            return (outputs - targets).square().mean() * self.weight

    loss = Weighted()
    exporter = ModuleExporter(nn.Linear(4, 4), loss)
    exporter.export_model(torch.randn(4, 4), torch.randn(4, 4))
    loss.weight = 2.0
    with pytest.raises(FailedPrecondition, match="'weight'"):
        exporter.export_variant(torch.randn(3, 2, 4), torch.randn(3, 2, 4), training=True, name="another")


def test_training_and_evaluating_here_meanwhile_changes_nothing():
    module = Scaled()
    module.norm.eval()
    exporter = ModuleExporter(module)
    exporter.export_model(torch.randn(4, 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    module.load_state_dict(module.state_dict())
    module.eval()
    # Flags are those of then, the frozen norm's too.
    (norm,) = [node for node in another(exporter).variant.graph.nodes if node.operator == "aten.batch_norm.default"]
    assert norm.arguments[5] is False and not module.training
    module.train()
    (norm,) = [node for node in another(exporter).variant.graph.nodes if node.operator == "aten.batch_norm.default"]
    assert norm.arguments[5] is False and module.norm.training


def test_variants_tell_that_the_module_changed_rather_than_blame_the_batch():
    module = Scaled()
    exporter = ModuleExporter(module)
    exported = exporter.export_model(torch.randn(4, 4))
    variants = Variants(
        exported.program.variants,
        refresh=lambda deadline: (),
        add=lambda *_: None,
        exporter=exporter,
        exported=exported.variants,
    )
    module.scale = 2.0
    given = Batch(torch.randn(8, 4))
    with pytest.raises(FailedPrecondition) as caught:
        variants.choose(Batch(from_nested(given.inputs, "inputs")), given, Deadline(5), training=True, targets=False)
    assert caught.value.reason == "MODULE_CHANGED"


def test_a_batch_that_a_deep_module_refuses_is_refused_without_an_export():
    layers = []
    for index in range(30):
        layers += [nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10))
    exporter = ModuleExporter(module, "cross_entropy")
    start = time.thread_time()
    exporter.export_model(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    exported = time.thread_time() - start
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    start = time.thread_time()
    with pytest.raises(ExportError) as caught:
        exporter.export_variant(torch.randn(4, 3, 9, 9), torch.randint(10, (4,)), training=True, name="another")
    # A collection of this process's garbage may fall in between, and takes most of a second.
    assert time.thread_time() - start < exported / 2
    assert caught.value.reason == "EXAMPLE_FAILED" and "shapes cannot be multiplied" in str(caught.value)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
