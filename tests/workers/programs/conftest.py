"""Export a module, send it through the contract's bytes, rebuild it as a rank does, and compare it with eager torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradwire.export import ExportedModel, ModuleExporter
from gradwire.exporting.example import as_example
from gradwire_proto.codec import decode_program, encode_program
from gradwire_proto.values import GraphLossSpec, OutputLossSpec
from gradwire_workers.programs import BuiltProgram, build_program


@dataclass
class RoundTrip:
    """A module here, and its program built as on a rank."""

    module: nn.Module
    loss: Any
    exporter: ModuleExporter
    exported: ExportedModel
    built: BuiltProgram

    def run(self, inputs: Any, targets: Any = None, *, training: bool = True, seed: int = 0) -> tuple[Any, Any, dict]:
        """(outputs in the module's own types, loss, gradients by name) of the rebuilt graph."""
        name = "train" if training else "eval"
        example = as_example(inputs, targets)
        torch.manual_seed(seed)
        outputs = self.built(name, *example.inputs)
        loss = self._loss(name, outputs, example.targets)
        tree = next(each for each in self.exported.variants if each.variant.name == name).output_tree
        parameters = {k: p for k, p in self.built.parameters_by_name().items() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if loss is not None else []
        return tree.unflatten(outputs), loss, dict(zip(parameters, gradients, strict=False))

    def _loss(self, name: str, outputs: list[Any], targets: list[Any]) -> Tensor | None:
        spec = self.exported.loss
        if isinstance(spec, OutputLossSpec):
            return outputs[spec.output_leaf]
        if isinstance(spec, GraphLossSpec):
            return self.built.loss(name, outputs, targets)
        return None if spec is None else self.exporter._loss.function(outputs[0], targets[0])

    def run_eagerly(self, inputs: Any, targets: Any = None, *, training: bool = True, seed: int = 0):
        """The same of the module itself, which this changes as a forward does."""
        self.module.train(training)
        torch.manual_seed(seed)
        positional, keyword = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        positional, keyword = ((inputs,), {}) if isinstance(inputs, Tensor) else (positional, keyword)
        outputs = self.module(*positional, **keyword)
        spec = self.exported.loss
        if isinstance(spec, OutputLossSpec):
            loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
        else:
            loss = None if spec is None else self.exporter._loss.function(outputs, targets)
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if loss is not None else []
        return outputs, loss, dict(zip(parameters, gradients, strict=False))

    def check(self, inputs: Any, targets: Any = None, *, training: bool = True, tolerance: float = 1e-6) -> None:
        """Outputs, loss, every gradient and every buffer of one forward and backward equal eager's."""
        theirs = self.run(inputs, targets, training=training)
        ours = self.run_eagerly(inputs, targets, training=training)
        assert theirs[2].keys() == ours[2].keys()
        for one, other in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            close(one, other, tolerance)
        state = self.built.all_state()
        for name, buffer in self.module.named_buffers():
            close(buffer, state[name], tolerance)


def close(one: Any, other: Any, tolerance: float) -> None:
    """Tensors of the same type are equal to `tolerance` times their norm; other values are equal."""
    if not isinstance(one, Tensor):
        assert one == other
        return
    assert one.dtype == other.dtype and one.shape == other.shape
    assert (one.double() - other.double()).norm() <= tolerance * one.double().norm().clamp_min(1e-3)


@pytest.fixture
def round_trip() -> Callable[..., RoundTrip]:
    """round_trip(module, inputs, targets, loss) -> RoundTrip, with a copy of the module for its runs to move."""

    def make(module: nn.Module, inputs: Any, targets: Any = None, loss: Any = None) -> RoundTrip:
        exporter = ModuleExporter(module, loss)
        exported = exporter.export_model(inputs, targets)
        program = decode_program(encode_program(exported.program))
        assert program == exported.program
        built = build_program(program, {name: tensor.clone() for name, tensor in exported.tensors.items()})
        return RoundTrip(copy.deepcopy(module), loss, exporter, exported, built)

    return make
