"""A user's module and loss -> a program: graphs over named tensors, checked against the module itself.

The module is never changed: flags, buffers, attributes and random state are put back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.exporting import module_guard
from gradwire.exporting.example import Example, as_example
from gradwire.exporting.finished_variant import Finished
from gradwire.exporting.loss_mapping import as_loss
from gradwire.exporting.module_signature import Signature
from gradwire.exporting.module_snapshot import Snapshot, preserved
from gradwire.exporting.module_state import ModuleState, describe_state
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.read_values import ReadValues
from gradwire.exporting.variant_export import VariantExport
from gradwire.exporting.weight_export import LossWeight
from gradwire_proto.errors import ExportError, InvalidArgument
from gradwire_proto.values import Batch, GraphLossSpec, LossSpec, OutputLossSpec, Program, StateTensor, Variant

# torch.export is not made for threads, and the guards change torch itself for a moment.
EXPORT_LOCK = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class ExportedVariant:
    """A variant, how its outputs become the module's own again, and what it adds to the program.

    tensors: constants that only this variant uses, and values: their values. operators: the schemas of its operators.
    """

    variant: Variant
    output_tree: OutputTree
    tensors: tuple[StateTensor, ...]
    values: Mapping[str, Tensor]
    operators: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A program with the variants "train" and "eval".

    tensors: the value of every tensor that is not an alias: live references, detached, on the user's device.
    example: the example that was used, with two rows where it had one.
    """

    program: Program
    loss: LossSpec | None
    tensors: Mapping[str, Tensor]
    variants: tuple[ExportedVariant, ...]
    example: Batch


class ModuleExporter:
    """Exports one module with one loss, for the batches that it will see.

    loss: a loss of torch.nn, its name, any callable(outputs, targets) -> scalar, or None. precision: "fp32", "bf16" or
    "fp16": under whose autocast the graphs are traced and checked, and must run. loss_weight: what the rows of a batch
    weigh in the loss, a function of the batch. Errors: InvalidArgument for a loss that is none; later ExportError, with
    `reason` and, where there is one, the parameter in `field`.
    """

    def __init__(
        self, module: nn.Module, loss: Any = None, precision: str = "fp32", loss_weight: LossWeight | None = None
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidArgument(
                f"expected an nn.Module, got a {type(module).__qualname__}", field="module", reason="MODULE_INVALID"
            )
        self._module = module
        if loss_weight is not None and not callable(loss_weight):
            raise InvalidArgument(
                f"expected a callable(inputs) or callable(inputs, targets), got a {type(loss_weight).__qualname__}",
                field="loss_weight",
                reason="LOSS_WEIGHT_INVALID",
            )
        self._loss = as_loss(loss)
        self._precision = precision
        self._loss_weight = loss_weight
        self._constants: dict[str, Tensor] = {}
        self._takes_targets = True
        self._signatures: list[tuple[nn.Module, Signature]] = []
        self._read_values: list[ReadValues] = []
        self._may_train: frozenset[str] = frozenset()

    def export_model(self, inputs: Any, targets: Any = None) -> ExportedModel:
        """The program for an example batch; see `ExportedModel`.

        Raises ExportError: EXAMPLE_FAILED (the module or the loss fails on the example), EXPORT_DATA_DEPENDENT,
        EXPORT_CUSTOM_FUNCTION, EXPORT_HOOK, EXPORT_PYTHON_RANDOM, EXPORT_PYTHON_STATE, EXPORT_MISMATCH,
        OPERATOR_NOT_ALLOWED, EXPORT_FAILED ...
        """
        if targets is None and self._loss is not None and self._loss.spec is not None:
            raise InvalidArgument(
                "the loss needs targets: (inputs, targets)", field="example", reason="EXAMPLE_INVALID"
            )
        self._takes_targets = targets is not None
        example = self._example(inputs, targets)
        with EXPORT_LOCK:
            state = self._state()
            values = ReadValues(self._modules(), self._loss.function if self._loss is not None else None)
            of_weight = ReadValues((), self._loss_weight)
            train, read = self._finish(example, state, training=True, name="train")
            self._constants |= train.constants
            if self._loss is not None and train.variant.loss_graph is not None:
                # The service computes it by graphs, then: every variant brings one.
                self._loss = replace(self._loss, spec=None)
            evaluation = None
            if not read and module_guard.modes_are_plain(self._module):
                evaluation = self._same_in_eval_mode(train, state)
            if evaluation is None:
                evaluation, _ = self._finish(example, state, training=False, name="eval")
            self._constants |= evaluation.constants
            left = train.left | evaluation.left
            self._may_train = train.may_train & evaluation.may_train
            self._signatures = [(module, Signature(module, left)) for module in self._modules()]
            values.settle(left)
            of_weight.settle()
            self._read_values = [values, of_weight]
        return self._assemble(state, train, evaluation)

    def export_variant(self, inputs: Any, targets: Any = None, *, training: bool, name: str) -> ExportedVariant:
        """Another variant of the program that `export_model` gave, for a batch that fits none. Errors as there.

        Raises FailedPrecondition MODULE_CHANGED where the module, the loss, or a value that they read is not what
        it was then.
        """
        example = self._example(inputs, targets)
        with EXPORT_LOCK, preserved(self._module, self._loss_module):
            for module, signature in self._signatures:
                signature.hold(module)
            for values in self._read_values:
                values.hold()
            finished, _ = self._finish(example, self._state(), training=training, name=name, doubtful=True)
            for values in self._read_values:
                values.settle()
            self._check_may_train(finished)
            return _exported(finished)

    def _check_may_train(self, finished: Finished) -> None:
        """What the model was told that it may unfreeze must have its gradient in every variant."""
        missing = sorted(self._may_train - finished.may_train)
        if missing:
            raise ExportError(
                f"the graph for this batch does not give the gradient of the frozen {missing[0]!r}, and others do:"
                " create the model with it unfrozen, and freeze it by an update",
                field=missing[0],
                reason="EXPORT_MISMATCH",
            )

    def _example(self, inputs: Any, targets: Any) -> Example:
        # Without a loss nobody looks at targets.
        return as_example(inputs, targets if self._loss is not None else None)

    @property
    def _loss_module(self) -> nn.Module | None:
        return self._loss.module if self._loss is not None else None

    def _modules(self) -> list[nn.Module]:
        return [module for module in (self._module, self._loss_module) if module is not None]

    def _state(self) -> ModuleState:
        for module, subject in zip(self._modules(), ("the module", "the loss"), strict=False):
            module_guard.refuse_scripted(module, subject)
        module_guard.refuse_hooks(self._module)
        return describe_state(self._module)

    def _finish(
        self, example: Example, state: ModuleState, *, training: bool, name: str, doubtful: bool = False
    ) -> tuple[Finished, bool]:
        """(the variant, whether the module looked at the mode in which it is).

        doubtful: the module may well refuse the example, so that it is tried first: an export takes long.
        """
        with preserved(self._module, self._loss_module):
            if not training:
                self._module.eval()
            elif not self._module.training:
                self._module.train()
            export = VariantExport(
                module=self._module,
                # A batch without the targets that the loss takes is for forward alone.
                loss=self._loss if example.targets or not self._takes_targets else None,
                state=state,
                training=training,
                name=name,
                constants=self._constants,
                snapshot=Snapshot(module=self._module, loss=self._loss_module),
                precision=self._precision,
                loss_weight=self._loss_weight,
            )
            if doubtful:
                export.run_module(example)
            with module_guard.training_flag_watched(self._module) as read:
                return export.finish(example), bool(read)

    def _same_in_eval_mode(self, train: Finished, state: ModuleState) -> Finished | None:
        """The training variant under the name "eval", where the module computes the same in both modes."""
        with preserved(self._module, self._loss_module):
            self._module.eval()
            same = train.agrees_with(self._module)
        if not same:
            return None
        return replace(
            train, variant=replace(train.variant, name="eval", training=False), constants={}, constant_specs=()
        )

    def _assemble(self, state: ModuleState, train: Finished, evaluation: Finished) -> ExportedModel:
        exported = (_exported(train), _exported(evaluation))
        constants = {**train.constants, **evaluation.constants}
        return ExportedModel(
            program=Program(
                torch_version=torch.__version__,
                tensors=(*self._described(state), *train.constant_specs, *evaluation.constant_specs),
                variants=(train.variant, evaluation.variant),
                operators={**train.operators, **evaluation.operators},
            ),
            loss=self._loss_spec(train),
            tensors={**state.values, **constants},
            variants=tuple(replace(each, tensors=(), values={}) for each in exported),
            example=train.example.batch,
        )

    def _described(self, state: ModuleState) -> Iterator[StateTensor]:
        for each in state.tensors:
            yield replace(each, may_train=(each.alias_of or each.name) in self._may_train)

    def _loss_spec(self, train: Finished) -> LossSpec | None:
        if self._loss is None:
            return None if train.loss_leaf is None else OutputLossSpec(train.loss_leaf)
        if train.variant.loss_graph is not None:
            return GraphLossSpec()
        return self._loss.spec


def _exported(finished: Finished) -> ExportedVariant:
    return ExportedVariant(
        variant=finished.variant,
        output_tree=finished.output_tree,
        tensors=finished.constant_specs,
        values=finished.constants,
        operators=finished.operators,
    )
