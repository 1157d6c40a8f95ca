"""What an export of one variant gives, and whether the module computes the same in another mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.exporting import safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.module_snapshot import rewound
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.random_state import seed
from gradwire.exporting.tracing import quiet
from gradwire.user_values import call_with
from gradwire_proto.autocast import autocast
from gradwire_proto.values import ROWS, StateTensor, Variant


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A variant that computes what the module does.

    loss_leaf: the output that is the loss, where the module returns it. outputs: what the module gave on the example.
    changing: the module's tensors that a forward changes. devices: the CUDA devices that it uses.
    left: the attributes that a forward changes, on which nothing depends. may_train: the frozen parameters whose
    gradient the graph gives all the same.
    """

    variant: Variant
    output_tree: OutputTree
    example: Example
    operators: Mapping[str, str]
    constants: Mapping[str, Tensor]
    constant_specs: tuple[StateTensor, ...]
    loss_leaf: int | None
    outputs: tuple[Any, ...]
    changing: tuple[Tensor, ...]
    devices: frozenset[int]
    left: frozenset[str]
    precision: str
    may_train: frozenset[str]

    @property
    def serves_one_row(self) -> bool:
        """Whether a batch may have a single row."""
        return all(symbol.min <= 1 for symbol in self.variant.symbols if symbol.name == ROWS)

    def agrees_with(self, module: nn.Module) -> bool:
        """Whether the module, in the mode in which it is now, gives the outputs that it gave when this was exported."""
        seed(self.devices)
        with torch.no_grad(), quiet(), autocast(self.precision), rewound(self.changing):
            inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.example.inputs]
            tree, outputs = OutputTree.of(call_with(module, self.example.input_structure, inputs))
        return tree.structure == self.output_tree.structure and safety_net.agree(self.outputs, outputs)
