"""A module that the rank built itself, run as programs of graphs are: by variants, on flat leaves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import Limits, StateTensor, Structure, Variant, unflatten
from gradwire_workers.architectures import layer_modes
from gradwire_workers.architectures.module_tensors import describe_tensors
from gradwire_workers.architectures.outputs import flatten_outputs
from gradwire_workers.architectures.refusals import unknown
from gradwire_workers.architectures.size_watch import SizeWatch
from gradwire_workers.programs.batch_norm import BatchNorm
from gradwire_workers.training.snapshots import Snapshot


class ArchitectureProgram(nn.Module):
    """Parameters and buffers by the module's own names, and the variants in which it was called.

    Made by `build_architecture`, without variants: `open` adds them.
    """

    def __init__(self, module: nn.Module, limits: Limits) -> None:
        super().__init__()
        self.module = module
        self.tensors, self._by_name = describe_tensors(module)
        self._variants: dict[str, Variant] = {}
        self._written: dict[str, list[Tensor]] = {}
        self._sizes = SizeWatch(limits.tensor_bytes)
        self._random = True
        self._given: dict[str, Tensor] = {}
        self._changes_inputs = any(getattr(each, "inplace", False) for each in module.modules())
        self._statistics = layer_modes.running_statistics(module)
        self._norms = layer_modes.batch_norms(module)
        parameters = inspect.signature(module.forward).parameters.values()
        self._keywords = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]

    tensors: tuple[StateTensor, ...]
    """Parameters and buffers, in the module's order."""

    def open(self, variant: Variant, leaves: Sequence[Any]) -> Variant:
        """Take batches like these leaves as `variant`, which says nothing of outputs yet. The variant, with them.

        Runs the module once. Nothing is changed but that; an unused variant of that name is forgotten.
        Raises InvalidArgument where the module does not take them.
        """
        self._check_names(variant.input_structure)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, str):
                raise InvalidArgument(f"leaf {index} is text", field="batch.inputs", reason="STRUCTURE_MISMATCH")
        self._sizes.forget(variant.name)
        before = [(buffer, buffer._version) for buffer in self._buffers_of_its_own()]
        snapshot = Snapshot([buffer for buffer, _ in before])
        try:
            with torch.no_grad(), self.without_randomness():
                _, structure = self._run(variant, leaves)
            written = [
                buffer for buffer, version in before if buffer._version != version or self._moves(buffer, variant)
            ]
        finally:
            snapshot.restore()
        opened = replace(variant, output_structure=structure)
        self._variants[variant.name], self._written[variant.name] = opened, written
        return opened

    def reopen(self, variant: Variant, written: Sequence[str] | None) -> None:
        """Take batches as one that `open` has returned before; the module is not run.

        written: the names of the buffers that it changes; None: any may be.
        """
        own = self._buffers_of_its_own()
        chosen = own if written is None else [self._by_name[name] for name in written]
        self._variants[variant.name], self._written[variant.name] = variant, chosen

    def written(self, variant_name: str) -> tuple[str, ...]:
        """The names of the buffers that the module changes in the variant's mode."""
        names = {id(each): name for name, each in self.all_state().items()}
        return tuple(names[id(each)] for each in self.mutated_buffers(variant_name))

    def forward(self, variant_name: str, *leaves: Any) -> list[Any]:
        """The flat outputs of the module for a variant's input leaves, in order."""
        return self.outputs(variant_name, leaves)

    def outputs(self, variant_name: str, leaves: Sequence[Any]) -> list[Any]:
        """The same, without what a module does around its forward."""
        variant = self.variant(variant_name)
        outputs, structure = self._run(variant, leaves)
        if structure != variant.output_structure:
            raise InvalidArgument(
                "the module nests its outputs in one way for some batches and in another for this",
                field="batch.inputs",
                reason="OUTPUT_UNSUPPORTED",
            )
        return outputs

    def _run(self, variant: Variant, leaves: Sequence[Any]) -> tuple[list[Any], Structure]:
        if self.module.training is not variant.training:
            self.module.train(variant.training)
        given = [leaf.clone() if self._changes_inputs and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = unflatten(variant.input_structure, given)
        with ExitStack() as modes:
            modes.enter_context(self._sizes.watch(variant.name, leaves))
            if not self._random:
                modes.enter_context(layer_modes.WithoutDropout())
            try:
                return flatten_outputs(self._call(inputs))
            except (AssertionError, KeyError, AttributeError) as error:
                text = str(error).strip() or type(error).__name__
                raise InvalidArgument(
                    f"the module failed on this batch: {text.splitlines()[0][:500]}",
                    field="batch",
                    reason="PROGRAM_FAILED",
                ) from error

    def _call(self, inputs: Any) -> Any:
        positional = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        named = inputs if isinstance(inputs, dict) else {}
        if self._given:
            return torch.func.functional_call(self.module, self._given, positional, named)
        return self.module(*positional, **named)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of all that were opened."""
        return tuple(self._variants)

    def variant(self, variant_name: str) -> Variant:
        """The variant of that name. Raises InvalidArgument for an unknown one."""
        try:
            return self._variants[variant_name]
        except KeyError:
            raise InvalidArgument(f"there is no variant {variant_name!r}", reason="VARIANT_UNKNOWN") from None

    def mutated_buffers(self, variant_name: str) -> list[Tensor]:
        """The buffers that the module changes in the variant's mode."""
        self.variant(variant_name)
        return self._written[variant_name]

    def is_random(self, variant_name: str) -> bool:
        """Whether it may draw random numbers: nobody looked."""
        return self.variant(variant_name).training

    def has_random_forward(self, variant_name: str) -> bool:
        """The same: losses by name draw none."""
        return self.is_random(variant_name)

    def has_functions(self, variant_name: str) -> bool:
        """No class here brings a function with a backward of its own."""
        self.variant(variant_name)
        return False

    def has_conditions(self, variant_name: str) -> bool:
        """No class here calls torch.cond."""
        self.variant(variant_name)
        return False

    def has_batch_norm(self, variant_name: str) -> bool:
        """Whether the module normalises with the batch's own statistics."""
        training = self.variant(variant_name).training
        return any(training or norm.running_mean is None for norm in self._norms)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, in the module's order. Tied ones are one tensor."""
        return {each.name: self._by_name[each.name] for each in self.tensors if each.role in ("parameter", "buffer")}

    def all_state(self) -> dict[str, Tensor]:
        """Every tensor of the module once, temporary buffers too."""
        return {each.name: self._by_name[each.name] for each in self.tensors if each.alias_of is None}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Parameters by name, in order, tied ones once."""
        return {name: tensor for name, tensor in self.all_state().items() if isinstance(tensor, nn.Parameter)}

    def replace_batch_norm(self, function: BatchNorm) -> None:
        """Make every batch norm call `function` with aten.batch_norm's nine arguments."""
        layer_modes.replace_batch_norms(self.module, function)

    @contextmanager
    def without_randomness(self) -> Iterator[None]:
        """Inside, the module runs with dropout off."""
        before, self._random = self._random, False
        try:
            yield
        finally:
            self._random = before

    @contextmanager
    def reading(self, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, the module reads these values in place of its own tensors that they are given for."""
        names = {tensor: name for name, tensor in self.all_state().items()}
        self._given = {names[tensor]: value for tensor, value in values.items()}
        try:
            yield
        finally:
            self._given = {}

    def _buffers_of_its_own(self) -> list[Tensor]:
        return [each for each in self.all_state().values() if not isinstance(each, nn.Parameter)]

    def _moves(self, buffer: Tensor, variant: Variant) -> bool:
        return variant.training and any(buffer is each for each in self._statistics)

    def _check_names(self, structure: Structure) -> None:
        """A name that the forward does not list would be ignored, or reach something deep inside."""
        if isinstance(structure, dict):
            for name in structure:
                if name not in self._keywords:
                    raise unknown(
                        name,
                        self._keywords,
                        what="the module's forward takes no",
                        field=f"batch.inputs.{name}",
                        reason="STRUCTURE_MISMATCH",
                    )
