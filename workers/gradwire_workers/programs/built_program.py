"""A program that can run: shared tensors and one raw graph for each variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import Limits, Program, StateTensor, Variant
from gradwire_workers.programs.batch_norm import BatchNorm, replace_batch_norms
from gradwire_workers.programs.variant_run import VariantRun


class BuiltProgram(nn.Module):
    """Parameters and buffers by the user's names, and the variants that run over them.

    Made by `build_program`. Graphs read the tensors that `state` gave; they must stay the same objects (change them in
    place), on the device they were built for. Registered as a module's parameters and buffers under names of its own.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        device: torch.device,
        limits: Limits,
        *,
        casts: bool = False,
    ) -> None:
        super().__init__()
        self._device = device
        self._limits = limits
        self._casts = casts
        self._program = replace(program, tensors=(), variants=(), operators={})
        self._tensors: dict[str, Tensor] = {}
        self._runs: dict[str, VariantRun] = {}
        self._random_runs: dict[str, VariantRun] | None = None
        self._batch_norm: BatchNorm | None = None
        self._merge(program.tensors, state, program.operators)
        for variant in program.variants:
            self._add(variant)

    @property
    def program(self) -> Program:
        """The program, with the variants that were added."""
        return self._program

    @property
    def tensors(self) -> tuple[StateTensor, ...]:
        """Parameters, buffers and constants, as the program describes them."""
        return self._program.tensors

    def forward(self, variant_name: str, *leaves: Any) -> list[Any]:
        """The flat outputs of a variant for its input leaves, in order (constants included, but not looked at)."""
        return self.outputs(variant_name, leaves)

    def outputs(self, variant_name: str, leaves: Sequence[Any]) -> list[Any]:
        """The same, without what a module does around its forward."""
        run = self._run(variant_name)
        run.sizes.before_run(leaves)
        return run.outputs(leaves)

    def loss(self, variant_name: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        """The scalar that the variant's loss graph makes of flat outputs and target leaves."""
        run = self._run(variant_name)
        if run.loss is None:
            raise InvalidArgument(f"variant {variant_name!r} has no loss graph", reason="NO_LOSS_GRAPH")
        run.sizes.before_loss(outputs, targets)
        return run.loss(outputs, targets)

    def weight(self, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        """What the rows of these leaves weigh in the loss, a scalar, as the variant's weight graph says."""
        run = self._run(variant_name)
        assert run.weight is not None, "asked for only where there is one"
        run.sizes.before_weight(inputs, targets)
        with torch.no_grad():
            weight = run.weight(inputs, targets)
        if not isinstance(weight, Tensor) or weight.numel() != 1 or weight.is_complex():
            raise InvalidArgument(
                "loss_weight must be one real number", field="variant.weight_graph", reason="WEIGHT_NOT_SCALAR"
            )
        return weight

    def variant(self, variant_name: str) -> Variant:
        """The variant of that name. Raises InvalidArgument for an unknown one."""
        return self._run(variant_name).variant

    def mutated_buffers(self, variant_name: str) -> list[Tensor]:
        """The tensors that running the variant changes: buffers, and parameters where a graph writes to them."""
        return [self._tensors[name] for name in self._run(variant_name).written]

    def is_random(self, variant_name: str) -> bool:
        """Whether running the variant, or its loss, draws random numbers."""
        run = self._run(variant_name)
        return run.is_random or run.has_random_loss

    def has_random_forward(self, variant_name: str) -> bool:
        """Whether running the variant draws random numbers, whatever its loss does."""
        return self._run(variant_name).is_random

    def has_functions(self, variant_name: str) -> bool:
        """Whether the variant, or its loss, calls functions that bring their own backward."""
        return self._run(variant_name).has_functions

    def has_conditions(self, variant_name: str) -> bool:
        """Whether the variant calls torch.cond."""
        return self._run(variant_name).has_conditions

    def has_batch_norm(self, variant_name: str) -> bool:
        """Whether the variant normalises with the batch's own statistics."""
        return self._run(variant_name).has_batch_norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by the user's names, in the module's order. Tied ones are one tensor."""
        return {
            each.name: self._tensors[each.name]
            for each in self._program.tensors
            if each.role in ("parameter", "buffer")
        }

    def all_state(self) -> dict[str, Tensor]:
        """Every tensor of the program once: temporary buffers and constants too, aliases left out."""
        return {each.name: self._tensors[each.name] for each in self._program.tensors if each.alias_of is None}

    def tensors_by_name(self) -> Mapping[str, Tensor]:
        """Every tensor of the program under each of its names."""
        return self._tensors

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Parameters by the user's names, in order, frozen ones too, aliases left out."""
        return {name: tensor for name, tensor in self.all_state().items() if isinstance(tensor, nn.Parameter)}

    def add_variant(
        self,
        variant: Variant,
        tensors: Sequence[StateTensor] = (),
        values: Mapping[str, Tensor] | None = None,
        operators: Mapping[str, str] | None = None,
    ) -> None:
        """Add a checked variant, with the constants that only it uses. After an error, nothing has changed."""
        if variant.name in self._runs:
            raise InvalidArgument(f"there is a variant {variant.name!r}", field="variant.name", reason="VARIANT_EXISTS")
        before, known, buffers = self._program, dict(self._tensors), dict(self._buffers)
        try:
            self._merge(tensors, values or {}, operators or {})
            self._add(variant)
        except Exception:
            self._program, self._tensors, self._buffers = before, known, buffers
            raise

    def replace_batch_norm(self, function: BatchNorm) -> None:
        """Make every training batch norm, of later variants too, call `function` with batch_norm's nine arguments."""
        self._batch_norm = function
        for run in (*self._runs.values(), *(self._random_runs or {}).values()):
            replace_batch_norms(run.module, function)

    @contextmanager
    def without_randomness(self) -> Iterator[None]:
        """Inside, variants and losses run with dropout off and fixed numbers in place of random ones."""
        kept = self._runs
        self._random_runs = kept
        self._runs = {name: run.without_randomness() for name, run in kept.items()}
        try:
            yield
        finally:
            self._runs, self._random_runs = kept, None

    @contextmanager
    def reading(self, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, variants and losses read these values in place of the program's tensors that they are given for."""
        kept = self._runs
        self._runs = {name: run.reading(values) for name, run in kept.items()}
        try:
            yield
        finally:
            self._runs = kept

    def _run(self, variant_name: str) -> VariantRun:
        try:
            return self._runs[variant_name]
        except KeyError:
            raise InvalidArgument(f"there is no variant {variant_name!r}", reason="VARIANT_UNKNOWN") from None

    def _merge(
        self, tensors: Sequence[StateTensor], values: Mapping[str, Tensor], operators: Mapping[str, str]
    ) -> None:
        for each in tensors:
            self._tensors[each.name] = self._tensors[each.alias_of] if each.alias_of else self._own(each, values)
        self._program = replace(
            self._program,
            tensors=(*self._program.tensors, *tensors),
            operators={**self._program.operators, **operators},
        )

    def _own(self, spec: StateTensor, values: Mapping[str, Tensor]) -> Tensor:
        tensor = values[spec.name].detach().to(self._device)
        # An index, because the user's names may be anything.
        registered = f"tensor_{len(self._parameters) + len(self._buffers)}"
        if spec.role == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=spec.requires_grad)
            self.register_parameter(registered, tensor)
        else:
            self.register_buffer(registered, tensor, persistent=False)
        return tensor

    def _add(self, variant: Variant) -> None:
        run = VariantRun.of(
            variant,
            self._program.operators,
            self._tensors,
            self._device,
            self._limits.tensor_bytes,
            batch_norm=self._batch_norm,
            casts=self._casts,
        )
        run.sizes.check_smallest()
        self._runs[variant.name] = run
        self._program = replace(self._program, variants=(*self._program.variants, variant))
