"""Forwards whose graph a rank keeps, and the backward of each, from cotangents of its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from gradwire_proto.values import BackwardQuery, Limits, Retention
from gradwire_workers.device_copies import to_device
from gradwire_workers.lifted_limits import are_lifted
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.gradients import add_up, apart
from gradwire_workers.training.passes import Passes, own_rows
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.saved_tensors import SavedTensors
from gradwire_workers.training.tensor_names import select


@dataclass(frozen=True, kw_only=True)
class Retained:
    """A forward that can be gone back through. shard: without its leaves. nbytes: of all ranks together; 0 where no
    output is differentiable on any.

    outputs: the differentiable ones, by leaf; inputs: those whose gradients can be asked for. Empty on an idle rank.
    """

    shard: Shard
    outputs: dict[int, Tensor]
    inputs: dict[int, Tensor]
    parameters: dict[str, Tensor]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class BackwardPass:
    """A rank's part of a backward: gradients by parameter, and of the inputs that were retained (None: of none)."""

    gradients: dict[Tensor, Tensor | None]
    input_gradients: list[Tensor | None] | None


class RetainedForwards:
    """The retained forwards of one rank, by name. The other ranks have the same."""

    def __init__(self, replica: Replica, passes: Passes, limits: Limits) -> None:
        self._replica = replica
        self._passes = passes
        self._limits = limits
        self._kept: dict[str, Retained] = {}

    def release(self, names: Iterable[str]) -> None:
        """Let go of forwards; names of none are passed over."""
        for name in names:
            self._kept.pop(name, None)

    def release_connected(self) -> None:
        """Let go of those whose backward has collectives over the connections between ranks: these are no more."""
        self._kept = {
            name: each
            for name, each in self._kept.items()
            if each.shard.whole or not self._replica.synchronises(each.shard.variant)
        }

    def keep(self, name: str, retained: Retained) -> None:
        """Keep it under that name."""
        self._kept[name] = retained

    def get(self, name: str) -> Retained:
        """The forward of that name. Raises FailedPrecondition RETAINED_GONE."""
        try:
            return self._kept[name]
        except KeyError:
            raise gone(name, self._limits) from None

    def forward(
        self, shard: Shard, retention: Retention, parameters: Mapping[str, Tensor], *, command: int, seed: int | None
    ) -> tuple[Retained, list[Any] | None]:
        """(the forward, of this rank's bytes, its outputs to give away). Batch norm's collectives included.

        Raises InvalidArgument at retain.inputs for a leaf that is no floating-point tensor.
        """
        specs = self._passes.variant(shard).input_leaves
        if any(index >= len(specs) for index in retention.inputs):
            message = f"expected leaves below {len(specs)}, as many as the inputs have"
            raise InvalidArgument(message, field="retain.inputs", reason="LEAF_UNKNOWN")
        bare = replace(shard, inputs=(), targets=())
        if shard.idle:
            return Retained(shard=bare, outputs={}, inputs={}, parameters=dict(parameters), nbytes=0), None
        # Copies: a message's memory is not the graph's to keep.
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in shard.inputs]
        inputs = {index: _differentiable(leaves[index], index) for index in retention.inputs}
        saved = SavedTensors(self._replica.program.all_state().values())
        saved.count(inputs.values())
        self._replica.seed(shard, command, seed)
        with self._only(parameters), saved.recorded():
            outputs = self._replica.outputs(replace(shard, inputs=tuple(leaves)))
        outputs = dict(enumerate(outputs))
        differentiable = {i: leaf for i, leaf in outputs.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
        saved.count(differentiable.values())
        retained = Retained(
            shard=bare,
            outputs=differentiable,
            inputs=inputs,
            parameters=dict(parameters),
            # Never 0 where there is a graph: one that only views parameters saves nothing of its own.
            nbytes=max(saved.nbytes, 1) if differentiable else 0,
        )
        return retained, self._passes.results(shard, list(outputs.values()))

    def check_room(self, nbytes: int) -> None:
        """Refuse a further forward of so many bytes on all ranks, where they are too many: alike on every rank."""
        held = sum(each.nbytes for each in self._kept.values())
        if held + nbytes > self._limits.retained_bytes and not are_lifted():
            raise ResourceExhausted(
                f"the forward would retain {nbytes} bytes beside {held} that are retained already, and the server's"
                f" setting retained_bytes allows {self._limits.retained_bytes}: call backward, drop what it is not"
                " called for, or run under torch.no_grad()",
                reason="RETAINED_BYTES",
            )

    def backward(self, query: BackwardQuery, cotangents: Sequence[Tensor | None]) -> BackwardPass:
        """This rank's part of the gradients. In a split batch, every rank at the same time.

        cotangents: of its own rows, one for each leaf of the outputs. Without `query.keep` the forward is gone after.
        """
        retained = self.get(query.retained)
        shard = retained.shard
        parameters = retained.parameters
        if query.wrt is not None:
            parameters = select(query.wrt, parameters, field="wrt")
        chosen = list({id(each): each for each in parameters.values()}.values())
        inputs = retained.inputs if query.input_gradients else {}
        if not query.keep:
            # Whatever becomes of it: what was freed on the way cannot be gone through again.
            self.release((query.retained,))
        found = self._differentiate(retained, cotangents, [*chosen, *inputs.values()], keep=query.keep)
        gradients = dict(zip(chosen, found[: len(chosen)], strict=True))
        of_inputs = self._over_ranks(shard, inputs, dict(zip(inputs, found[len(chosen) :], strict=True)))
        asked = query.input_gradients and not shard.idle
        return BackwardPass(gradients=gradients, input_gradients=list(of_inputs.values()) if asked else None)

    def _differentiate(
        self, retained: Retained, cotangents: Sequence[Tensor | None], wanted: Sequence[Tensor], *, keep: bool
    ) -> list[Tensor | None]:
        if retained.shard.idle or not wanted:
            return [None] * len(wanted)
        outputs, given = [], []
        for index, output in retained.outputs.items():
            cotangent = cotangents[index]
            if cotangent is not None:
                outputs.append(output)
                # A dummy row's outputs count nothing.
                given.append(to_device(cotangent, output.device) if retained.shard.count else torch.zeros_like(output))
        found = torch.autograd.grad(outputs, wanted, given, retain_graph=keep, allow_unused=True)
        # Copies where the graph lives on: a gradient may be what it has saved.
        return apart(found, wanted, copy=keep or self._replica.program.has_functions(retained.shard.variant))

    def _over_ranks(
        self, shard: Shard, inputs: Mapping[int, Tensor], found: dict[int, Tensor | None]
    ) -> dict[int, Tensor | None]:
        groups = self._passes.groups
        if groups is None or shard.whole:
            return found
        specs = self._passes.variant(shard).input_leaves
        shared = [index for index in inputs if not has_rows(specs[index])]
        summed = add_up([found[index] for index in shared], [inputs[index] for index in shared], groups)
        mine = {
            index: gradient if gradient is None or not has_rows(specs[index]) else own_rows(gradient, shard)
            for index, gradient in found.items()
        }
        return mine | dict(zip(shared, summed, strict=True))

    @contextmanager
    def _only(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, no other parameters require gradients."""
        wanted = {id(each) for each in parameters.values()}
        others = [each for each in self._replica.program.parameters() if each.requires_grad and id(each) not in wanted]
        try:
            for each in others:
                each.requires_grad_(False)
            yield
        finally:
            for each in others:
                each.requires_grad_(True)


def gone(name: str, limits: Limits) -> FailedPrecondition:
    """The error of a backward whose forward is not retained any more."""
    return FailedPrecondition(
        f"no forward {name} is retained: it has been gone back through without keeping it, or released, a command"
        " failed on a rank since, or settings of the model were changed (Model.update), or it was not used for"
        f" {limits.retained_seconds:g} s (the server's setting retained_seconds)",
        reason="RETAINED_GONE",
    )


def _differentiable(leaf: Any, index: int) -> Tensor:
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.requires_grad_()
    raise InvalidArgument(
        f"leaf {index} of the inputs is no floating-point tensor",
        field="retain.inputs",
        reason="LEAF_NOT_DIFFERENTIABLE",
    )
