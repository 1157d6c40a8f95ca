"""The variants of one model, as its client knows them: which one a batch fits, and another where it fits none.

A graph has the sizes of its example baked in where they could not be left open. A batch of other sizes is exported
again and added to the model, unseen by the user, wherever the user's module itself can run it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradwire.deadline import Deadline
from gradwire.errors import ExportError, FailedPrecondition, GradwireError
from gradwire_proto.batch_check import check_batch, select_variant
from gradwire_proto.tensors import from_nested
from gradwire_proto.values import Batch, Variant

if TYPE_CHECKING:
    from gradwire.export import ExportedVariant, ModuleExporter

_MISFITS = {
    "STRUCTURE_MISMATCH",
    "CONSTANT_MISMATCH",
    "DTYPE_MISMATCH",
    "SHAPE_MISMATCH",
    "ROWS_MISMATCH",
    "NO_VARIANT",
}
"""Reasons that another variant may cure."""


class Variants:
    """The variants of one model.

    exporter: makes more of them; None where the module is in another process. add: brings one to the service, given the
    batch that asked for it. refresh: the variants that the service has now. Both are parts of the call that has the
    batch, and take its deadline. made_there: the service makes them itself, for every batch (an architecture).
    """

    def __init__(
        self,
        known: Iterable[Variant],
        *,
        refresh: Callable[[Deadline], Iterable[Variant]],
        add: Callable[[ExportedVariant, Batch, Deadline], None],
        exporter: ModuleExporter | None = None,
        exported: Iterable[ExportedVariant] = (),
        made_there: bool = False,
    ) -> None:
        self._known = tuple(known)
        self._refresh = refresh
        self._add = add
        self._exporter = exporter
        self._rebuild = {item.variant.name: item.output_tree.rebuild for item in exported}
        self._made_there = made_there
        self._growing = threading.Lock()

    def have(self, batch: Batch, *, training: bool, targets: bool) -> bool:
        """Whether `choose` finds one that is there already."""
        if self._made_there:
            return True
        try:
            select_variant(self._known, batch, training=training, targets=targets)
        except GradwireError:
            return False
        return True

    def choose(
        self, batch: Batch, given: Batch, deadline: Deadline, *, training: bool, targets: bool
    ) -> Variant | None:
        """The variant that fits `batch` (TensorData leaves), made from `given` (the user's own tensors) if need be.

        None where the service makes it.

        Raises InvalidArgument where the batch fits none and the module itself refuses it too: the error names the field
        and what it should be. Raises ExportError where the module takes the batch but cannot be exported with it, and
        FailedPrecondition MODULE_CHANGED where that would need the module as it was when the model was created.
        """
        if self._made_there:
            return None
        try:
            return select_variant(self._known, batch, training=training, targets=targets)[0]
        except GradwireError as misfit:
            if misfit.reason not in _MISFITS:
                raise
            return self._grow(misfit, batch, given, deadline, training=training, targets=targets)

    def ensure(self, described: Batch, example: Callable[[], Batch], deadline: Deadline, *, training: bool) -> None:
        """See that there is a variant for batches with targets like `described`, whose tensors have no elements.

        example: gives such a batch, of the user's own tensors, to make one with. Raises what `choose` does.
        """
        if self._made_there:
            return
        try:
            select_variant(self._known, described, training=training, targets=True)
        except GradwireError as misfit:
            if misfit.reason not in _MISFITS:
                raise
            given = example()
            batch = Batch(from_nested(given.inputs, "batch.inputs"), from_nested(given.targets, "batch.targets"))
            self._grow(misfit, batch, given, deadline, training=training, targets=True)

    def rebuild(self, variant: Variant | None, outputs: Any) -> Any:
        """Outputs of `variant` as the module returns them; tuples, lists and dicts where the module is not at hand."""
        rebuild = None if variant is None else self._rebuild.get(variant.name)
        return outputs if rebuild is None else rebuild(outputs)

    def _grow(
        self, misfit: GradwireError, batch: Batch, given: Batch, deadline: Deadline, *, training: bool, targets: bool
    ) -> Variant:
        with self._growing:
            try:
                if self._exporter is None:
                    self._known = tuple(self._refresh(deadline))
                return select_variant(self._known, batch, training=training, targets=targets)[0]
            except GradwireError:
                if self._exporter is None:
                    raise misfit from None
            name = f"{'train' if training else 'eval'}-{uuid.uuid4().hex[:8]}"
            exported = self._export(misfit, given, training=training, name=name)
            # The module may look at less than the batch brings, such as targets that no loss compares with.
            check_batch(exported.variant, batch, targets=targets)
            self._add(exported, batch, deadline)
            self._rebuild[name] = exported.output_tree.rebuild
            self._known = (*self._known, without_graph(exported.variant))
            return exported.variant

    def _export(self, misfit: GradwireError, given: Batch, *, training: bool, name: str) -> ExportedVariant:
        assert self._exporter is not None
        try:
            return self._exporter.export_variant(given.inputs, given.targets, training=training, name=name)
        except GradwireError as error:
            if isinstance(error, (ExportError, FailedPrecondition)) and error.reason != "EXAMPLE_FAILED":
                raise
            # The module refuses the batch as well, so the batch is wrong, and the misfit says where.
            misfit.add_note(f"The module itself: {error.message}")
            raise misfit from None


def without_graph(variant: Variant) -> Variant:
    """`variant` as a description: what is needed to tell whether a batch fits."""
    return replace(variant, graph=None, loss_graph=None, weight_graph=None)
