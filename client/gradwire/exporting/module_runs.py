"""Runs of a module and of its graph, to be compared. After each, the module and its loss are as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradwire.exporting import python_state, safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.graph_run import GraphRun, as_scalar
from gradwire.exporting.loss_mapping import Loss
from gradwire.exporting.module_snapshot import Snapshot, rewound
from gradwire.exporting.module_state import ModuleState, buffer_values, thawed
from gradwire.exporting.output_tree import OutputTree
from gradwire.user_values import call_with
from gradwire_proto.errors import ExportError, GradwireError
from gradwire_proto.values import unflatten


@dataclass(frozen=True, kw_only=True)
class ModuleRuns:
    """A module in the mode in which it is, with its loss where there is one.

    snapshot: the module and the loss, as they are before each run. precision: the autocast of the runs.
    """

    module: nn.Module
    loss: Loss | None
    state: ModuleState
    snapshot: Snapshot
    precision: str

    @contextmanager
    def rewound(self, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
        """After, the module and the loss are as before, parameters among `tensors` too."""
        try:
            with rewound(tensors):
                yield
        finally:
            self.snapshot.restore()

    def buffers(self) -> Mapping[str, Tensor]:
        """The values of the module's buffers now."""
        return buffer_values(self.module)

    def forward(self, example: Example, trees: list[OutputTree] | None = None) -> safety_net.Forward:
        """The module's forward and loss. trees: takes how each run nests its outputs."""

        def forward(leaves: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
            output = call_with(self.module, example.input_structure, list(leaves))
            tree, flat = OutputTree.of(output)
            if trees is not None:
                trees.append(tree)
            if self.loss is None:
                return flat, None
            targets = unflatten(example.target_structure, example.targets)
            return flat, as_scalar(self.loss.function(output, targets))

        return forward

    def check_example(self, example: Example) -> None:
        """Raise EXAMPLE_FAILED if the module itself fails on the example."""
        with self.rewound(self.state.by_name.values()):
            safety_net.run(
                self.forward(example),
                example.inputs,
                {},
                subject="the module",
                differentiate=False,
                precision=self.precision,
            )

    def watched(
        self, example: Example, changing: list[Tensor], trees: list[OutputTree]
    ) -> tuple[safety_net.Run, frozenset[str], bool]:
        """(what the module gives, the attributes that it changes idly, whether its inputs can have gradients)."""
        try:
            return *self._watched(example, changing, trees, differentiate_leaves=True), True
        except ExportError as error:
            if error.reason != "EXAMPLE_FAILED":
                raise
        # Some operators do not differentiate every input, such as targets among them.
        return *self._watched(example, changing, trees, differentiate_leaves=False), False

    def without_leaves(self, example: Example, changing: list[Tensor]) -> safety_net.Run:
        """What the module gives where its inputs need no gradients."""
        return self._watched(example, changing, [], differentiate_leaves=False)[0]

    def _watched(
        self, example: Example, changing: list[Tensor], trees: list[OutputTree], *, differentiate_leaves: bool
    ) -> tuple[safety_net.Run, frozenset[str]]:
        forward = self.forward(example, trees)

        def once(inputs: Sequence[Any]) -> safety_net.Run:
            with rewound(changing):
                return safety_net.run(
                    forward,
                    inputs,
                    self.state.trainable,
                    subject="the module",
                    differentiate_leaves=differentiate_leaves,
                    buffers=self.buffers,
                    precision=self.precision,
                )

        with self.rewound():
            first = once(example.inputs)
            left = python_state.refuse_dependence(
                self.snapshot, first, lambda: once(example.inputs), lambda: once(example.other_inputs())
            )
            return first, left

    def of_graph(self, check: GraphRun, changing: list[Tensor], *, differentiate_leaves: bool) -> safety_net.Run:
        """What the exported graph gives."""
        with self.rewound(changing):
            return safety_net.run(
                check.forward,
                check.example.inputs,
                self.state.trainable,
                subject="the exported graph",
                differentiate_leaves=differentiate_leaves,
                buffers=self.buffers,
                precision=self.precision,
            )

    def may_train(self, check: GraphRun, changing: list[Tensor]) -> frozenset[str]:
        """The frozen parameters whose gradient is the graph's too, once they are unfrozen.

        A graph need not give it: a function that brings its own backward is traced for what needed gradients then.
        """
        frozen = self.state.frozen
        if not frozen:
            return frozenset()
        runs = []
        try:
            with thawed(frozen):
                for forward in (self.forward(check.example), check.forward):
                    with self.rewound(changing):
                        runs.append(
                            safety_net.run(
                                forward,
                                check.example.inputs,
                                {**self.state.trainable, **frozen},
                                subject="the module with its frozen parameters unfrozen",
                                differentiate_leaves=False,
                                precision=self.precision,
                            )
                        )
        except GradwireError:
            # It cannot even be run so; as it is, it can.
            return frozenset()
        return safety_net.same_gradients(*runs) & frozen.keys()
