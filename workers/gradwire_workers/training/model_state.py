"""All that a rank's model depends on, read, and a model that goes on from it: bit for bit as if it had never stopped.

Random numbers are no part of it: every command seeds its own. Nor are forwards that are retained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import Variant
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.training.held_gradients import HeldGradients
from gradwire_workers.training.loss_weights import weight_named
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.trainable import set_trained


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a rank goes on from, beside the tensors of its program.

    optimizer: what `Updater.state` gave. trained: names of parameters. held: parts of the held gradients that this rank
    is to hold, added up; None where none are held on any. weights: the keys of loss weights, by variant. opened: an
    architecture's variants, with the names of the buffers that each changes, None where that is not known.
    """

    optimizer: Mapping[str, Any] | None
    step: int
    trained: Sequence[str]
    held: Sequence[Mapping[str, Tensor]] | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    opened: Sequence[tuple[Variant, Sequence[str] | None]] = ()

    def prepare(self, replica: Replica) -> dict[str, nn.Parameter]:
        """Make a new replica's variants and parameters what they were. Returns those that are trained, in order.

        FailedPrecondition (STATE_UNFIT) where they are another model's.
        """
        parameters = replica.program.parameters_by_name()
        if not set(self.trained) <= parameters.keys():
            message = "the state trains parameters that the model has not: it is another model's"
            raise FailedPrecondition(message, reason="STATE_UNFIT")
        names = frozenset(self.trained)
        trained = {name: each for name, each in parameters.items() if name in names}
        set_trained(parameters, trained)
        for variant, written in self.opened:
            assert isinstance(replica.program, ArchitectureProgram)
            replica.program.reopen(variant, written)
        for name, key in self.weights.items():
            replica.weigh(name, weight_named(key, replica.graphs, replica.program.variant(name)))
        return trained

    def hold(self, held: HeldGradients, trained: Mapping[str, nn.Parameter]) -> None:
        """Hold the gradients that were held."""
        if self.held is None:
            return
        held.hold([None for _ in trained])
        for parts in self.held:
            held.hold(held.plus({trained[name]: _own(part, trained[name]) for name, part in parts.items()}))


def _own(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy, laid out as gradients are."""
    return torch.empty_like(parameter, dtype=part.dtype, requires_grad=False).copy_(part)
