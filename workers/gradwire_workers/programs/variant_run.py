"""A variant of a program, ready to run: its graphs, and which tensors go where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from gradwire_proto.conditions import run_cond
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.function_replay import ReplayedFunction
from gradwire_proto.graph_writes import written_inputs
from gradwire_proto.values import GraphInput, Variant
from gradwire_workers.programs.batch_norm import BatchNorm, replace_batch_norms, training_batch_norms
from gradwire_workers.programs.graph_builder import build_graph
from gradwire_workers.programs.randomness import is_random, without_randomness
from gradwire_workers.programs.size_guard import SizeGuard


@dataclass(kw_only=True)
class VariantRun:
    """See the module. Made by `of`."""

    variant: Variant
    module: fx.GraphModule
    template: list[Tensor | None]
    leaf_positions: list[tuple[int, int]]
    written_leaves: list[tuple[int, int]]
    loss: LossRun | None
    weight: LossRun | None
    written: tuple[str, ...]
    is_random: bool
    has_random_loss: bool
    has_batch_norm: bool
    has_functions: bool
    has_conditions: bool
    sizes: SizeGuard

    @classmethod
    def of(
        cls,
        variant: Variant,
        operators: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        tensor_bytes: int,
        *,
        batch_norm: BatchNorm | None,
        casts: bool,
    ) -> VariantRun:
        """A checked variant over the program's tensors. batch_norm: what its training batch norms call, if anything."""
        graph = variant.graph
        assert graph is not None, "graph_check lets no variant through without its graph"
        module = build_graph(graph, device, tensor_bytes)
        if batch_norm is not None:
            replace_batch_norms(module, batch_norm)
        written = sorted(written_inputs(graph, operators))
        names = [variant.graph_inputs[index].key for index in written if variant.graph_inputs[index].kind == "tensor"]
        loss = loss_module = None
        if variant.loss_graph is not None:
            loss_module = build_graph(variant.loss_graph, device, tensor_bytes)
            loss = LossRun(loss_module, variant.loss_graph_inputs, tensors, ("output", "target"))
        weight = weight_module = None
        if variant.weight_graph is not None:
            if written_inputs(variant.weight_graph, operators):
                raise InvalidArgument(
                    "a weight graph changes nothing", field="variant.weight_graph", reason="GRAPH_MALFORMED"
                )
            weight_module = build_graph(variant.weight_graph, device, tensor_bytes)
            weight = LossRun(weight_module, variant.weight_graph_inputs, tensors, ("input", "target"))
        return cls(
            variant=variant,
            module=module,
            template=[tensors[str(i.key)] if i.kind == "tensor" else None for i in variant.graph_inputs],
            leaf_positions=_positions(variant.graph_inputs, "input"),
            written_leaves=[(i, int(b.key)) for i in written if (b := variant.graph_inputs[i]).kind == "input"],
            loss=loss,
            written=tuple(dict.fromkeys(str(name) for name in names)),
            is_random=is_random(module),
            has_random_loss=any(each is not None and is_random(each) for each in (loss_module, weight_module)),
            has_batch_norm=any(True for _ in training_batch_norms(module)),
            has_functions=any(map(_has_functions, (module, loss_module))),
            has_conditions=_has_conditions(module),
            weight=weight,
            sizes=SizeGuard(
                variant,
                module,
                loss_module,
                weight_module,
                tensors,
                tensor_bytes,
                casts=casts,
            ),
        )

    def __post_init__(self) -> None:
        first = len(self.template) - len(self.leaf_positions)
        self._tensors = self.template[:first]
        # As torch.export has them: tensors, and then all leaves in order.
        every = [(first + index, index) for index in range(len(self.variant.input_leaves))]
        self._leaves_follow = self.leaf_positions == every

    def reading(self, values: Mapping[Tensor, Tensor]) -> VariantRun:
        """The same with these values in place of the tensors that they are given for."""
        loss = None if self.loss is None else self.loss.reading(values)
        return replace(self, template=_replaced(self.template, values), loss=loss)

    def without_randomness(self) -> VariantRun:
        """The same with dropout off and fixed numbers in place of random ones."""
        run = replace(self, module=without_randomness(self.module)) if self.is_random else self
        if not self.has_random_loss:
            return run
        loss, weight = (None if each is None else each.without_randomness() for each in (self.loss, self.weight))
        return replace(run, loss=loss, weight=weight)

    def outputs(self, leaves: Sequence[Any]) -> list[Any]:
        """The flat outputs for the input leaves."""
        if not self.written_leaves and self._leaves_follow:
            return list(self.module.forward(*self._tensors, *leaves))
        inputs: list[Any] = self.template.copy()
        for position, leaf in self.leaf_positions:
            inputs[position] = leaves[leaf]
        for position, leaf in self.written_leaves:
            # The batch's memory is not the graph's to change; some of it cannot even be written.
            inputs[position] = leaves[leaf].clone()
        return list(self.module.forward(*inputs))


def _has_functions(module: fx.GraphModule | None) -> bool:
    return module is not None and any(isinstance(each, ReplayedFunction) for each in module.modules())


def _has_conditions(module: fx.GraphModule) -> bool:
    graphs = (each.graph for each in module.modules() if isinstance(each, fx.GraphModule))
    return any(node.target is run_cond for graph in graphs for node in graph.nodes)


class LossRun:
    """A loss or weight graph, ready to run. kinds: what its first and second arguments are."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: tuple[GraphInput, ...],
        tensors: Mapping[str, Tensor],
        kinds: tuple[str, str],
    ) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._template = [tensors[str(each.key)] if each.kind == "tensor" else None for each in inputs]
        self._positions = [_positions(inputs, kind) for kind in kinds]

    def reading(self, values: Mapping[Tensor, Tensor]) -> LossRun:
        """See `VariantRun.reading`."""
        changed = copy(self)
        changed._template = _replaced(self._template, values)
        return changed

    def without_randomness(self) -> LossRun:
        """See `VariantRun.without_randomness`."""
        changed = copy(self)
        changed._module = without_randomness(self._module)
        changed._forward = changed._module.forward
        return changed

    def __call__(self, *arguments: Sequence[Any]) -> Tensor:
        inputs: list[Any] = self._template.copy()
        for positions, leaves in zip(self._positions, arguments, strict=True):
            for position, leaf in positions:
                inputs[position] = leaves[leaf]
        return self._forward(*inputs)[0]


def _replaced(template: Sequence[Tensor | None], values: Mapping[Tensor, Tensor]) -> list[Tensor | None]:
    return [None if tensor is None else values.get(tensor, tensor) for tensor in template]


def _positions(inputs: Sequence[GraphInput], kind: str) -> list[tuple[int, int]]:
    return [(position, int(each.key)) for position, each in enumerate(inputs) if each.kind == kind]
