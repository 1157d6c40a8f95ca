"""One rank's copy of a model, run on shards: outputs and the rank's part of the loss. Updates nothing but buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.autocast import autocast
from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import ArchitectureSpec, Limits, ModelSpec
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.architectures.build import build_architecture
from gradwire_workers.device_copies import to_device
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs import BuiltProgram, build_program
from gradwire_workers.programs.sync_batch_norm import SyncBatchNorm
from gradwire_workers.shard import Shard
from gradwire_workers.training.batch_loss import BatchLoss, LocalLoss
from gradwire_workers.training.loss_weights import LossWeight
from gradwire_workers.training.seeds import command_seed, loss_seed, seed_generators


class Replica(nn.Module):
    """The program, its loss and its random numbers, for one rank."""

    def __init__(
        self,
        spec: ModelSpec,
        state: dict[str, Tensor],
        rank: int,
        device: torch.device,
        limits: Limits,
        weights_folder: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(spec.program, ArchitectureSpec):
            program: BuiltProgram | ArchitectureProgram = build_architecture(
                spec.program, spec.seed, device, limits=limits, weights_folder=weights_folder, values=state
            )
        else:
            program = build_program(
                spec.program,
                state,
                device,
                limits=limits,
                field="model.program.graphs",
                casts=spec.precision != "fp32",
            )
        self.program = program
        # A module looks for its modules last of all: several times a step, that takes its time.
        self.__dict__["program"] = program
        self.spec, self.rank, self.device, self.limits = spec, rank, device, limits
        self.precision = spec.precision
        self.scale = 1.0
        """What gradients are to be multiplied by in the next backward."""
        self._loss = None if spec.loss is None else BatchLoss(spec.loss, self.program, device)
        self._sync_batch_norm = SyncBatchNorm(own_rows=not spec.sync_batch_norm)
        self._seed = spec.seed
        self._loss_seed: int | None = None
        self.groups: ProcessGroups | None = None
        self.program.replace_batch_norm(self._sync_batch_norm.batch_norm)

    @property
    def graphs(self) -> BuiltProgram:
        """The program where it is one of graphs, as the caller knows."""
        assert isinstance(self.program, BuiltProgram)
        return self.program

    def check_has_loss(self) -> None:
        """Refuse a command that needs a loss where there is none."""
        if self._loss is None:
            raise FailedPrecondition("the model has no loss: give one to create_model", reason="NO_LOSS")

    def localise(self, shard: Shard) -> Shard:
        """The shard with its tensors on this rank's device."""
        if self.device.type == "cpu":
            return shard
        return replace(shard, inputs=self.moved(shard.inputs), targets=self.moved(shard.targets))

    def seed(self, shard: Shard, command: int, given: int | None = None, *, stream: int | None = None) -> None:
        """Set the random numbers of a pass, if it draws any. `stream`: of which numbers, this rank's own for None."""
        if self.program.is_random(shard.variant):
            rank = self.rank if stream is None else stream
            seed = command_seed(model_seed=self._seed, command=command, rank=rank, given=given)
            seed_generators(seed, self.device)
            drawn = self.program.has_random_forward(shard.variant)
            self._loss_seed = loss_seed(model_seed=self._seed, command=command, given=given, drawn=drawn)

    def _seed_alike(self) -> None:
        """Set the random numbers of the rest of a pass to the same on every rank."""
        if self._loss_seed is not None:
            seed_generators(self._loss_seed, self.device)

    def forward(self, shard: Shard) -> Tensor:
        """The rank's part of the loss, to call backward on: DDP must see nothing that the loss does not depend on."""
        _, loss = self.outputs_and_loss(shard)
        self._value = loss.value
        return loss.differentiable

    def take_value(self) -> Tensor:
        """What the last `forward` adds to the loss."""
        return self.__dict__.pop("_value")

    def outputs(self, shard: Shard) -> list[Any]:
        """The flat outputs of the shard's variant for its rows. In a split batch, every rank at the same time."""
        if self.precision == "fp32" and self._groups_of(shard) is None:
            return self.program.outputs(shard.variant, shard.inputs)
        with self._precise(), self._over_ranks(shard):
            return self.program(shard.variant, *shard.inputs)

    def repeatable(self, shard: Shard, seed: int | None) -> Callable[[Sequence[Any]], list[Any]]:
        """The shard's variant as a function of input leaves that draws the same random numbers each time."""

        def outputs(leaves: Sequence[Any]) -> list[Any]:
            self.seed(shard, 0, seed)
            return self.program(shard.variant, *leaves)

        return outputs

    def outputs_and_loss(self, shard: Shard) -> tuple[list[Any], LocalLoss]:
        """The outputs, and the rank's part of the loss. In a split batch, every rank at the same time."""
        if self.precision == "fp32":
            if self.groups is None or shard.whole:
                assert self._loss is not None, "checked before"
                outputs = self.program.outputs(shard.variant, shard.inputs)
                return outputs, self._loss.of_whole(shard.variant, outputs, shard.targets, self.scale)
            outputs = self.outputs(shard)
            return outputs, self.loss(shard, outputs, self.scale)
        # One region, as in a training loop: what autocast has cast of a weight serves forward and loss alike.
        with self._precise():
            outputs = self.outputs(shard)
            return outputs, self.loss(shard, outputs, self.scale)

    def loss(self, shard: Shard, outputs: Sequence[Any], scale: float = 1.0) -> LocalLoss:
        """The rank's part of the loss, `scale` times what is differentiated. In a split batch, all ranks together."""
        assert self._loss is not None, "checked before"
        groups = self._groups_of(shard)
        if groups is None and self.precision == "fp32":
            return self._loss.of_whole(shard.variant, outputs, shard.targets, scale)
        with self._precise():
            if groups is None:
                return self._loss.of_whole(shard.variant, outputs, shard.targets, scale)
            return self._loss.of_shard(shard, outputs, shard.targets, groups, scale, seed_alike=self._seed_alike)

    def adds_up(self, shard: Shard, outputs: Sequence[Any]) -> bool:
        """Whether the ranks' parts of the loss add up to the whole one, not only their gradients."""
        assert self._loss is not None, "checked before"
        return self._groups_of(shard) is None or self._loss.is_sum(shard.variant, outputs, shard.targets)

    def check_targets(self, shard: Shard, outputs: Sequence[Any]) -> None:
        """Refuse targets that have no place in outputs such as these, which may be of other rows."""
        assert self._loss is not None, "checked before"
        self._loss.check(outputs, shard.targets)

    def traced(self, shard: Shard, *, rows: bool) -> tuple[list[Any], Tensor | None]:
        """The outputs, and the loss of just this shard, without a look at any target's value. For a trace.

        rows: the loss over the shard's rows, before it is divided by what all ranks' rows weigh; None for a loss that
        is no sum over rows.
        """
        assert self._loss is not None and self.groups is None
        self._loss.trust_targets()
        if not rows:
            outputs, loss = self.outputs_and_loss(shard)
            return outputs, loss.differentiable
        with self._precise():
            outputs = self.outputs(shard)
            return outputs, self._loss.row_total(shard.variant, outputs, shard.targets)

    def divisor(self, shard: Shard, outputs: Sequence[Any], total: torch.dtype) -> Tensor | float:
        """What the sum that `traced` gives for rows is divided by. Every rank calls it.

        Of the outputs, types and shapes are looked at.
        """
        assert self._loss is not None and self.groups is not None
        return self._loss.divisor(shard, outputs, shard.targets, self.groups, total)

    def combined_outputs(self, shard: Shard, outputs: Sequence[Any]) -> list[Any]:
        """The outputs of a split batch, with the whole batch's loss in place of this rank's. Every rank calls it."""
        leaf = self._own_leaf(outputs)
        if leaf is None:
            return list(outputs)
        groups = self._groups_of(shard)
        assert groups is not None, "the batch is split"
        own = self.loss(shard, outputs).value
        value = groups.all_reduce(own.to(torch.float64, copy=True)).to(own.dtype)
        return [value if index == leaf else output for index, output in enumerate(outputs)]

    def row_outputs(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs that have rows: all but the loss, where the program returns it itself."""
        leaf = self._own_leaf(outputs)
        return [output for index, output in enumerate(outputs) if index != leaf]

    def has_own_loss(self, outputs: Sequence[Any]) -> bool:
        """Whether the loss is among the outputs."""
        return self._own_leaf(outputs) is not None

    def weigh(self, variant: str, weight: LossWeight | None) -> None:
        """From here on, losses of shards of the variant are combined by this weight; None: as the loss's kind tells."""
        assert self._loss is not None
        self._loss.weigh(variant, weight)

    def weight_of(self, variant: str) -> LossWeight | None:
        """By what losses of shards of the variant are combined; None: as the loss's kind tells."""
        return None if self._loss is None else self._loss.weight_of(variant)

    def combines_outputs(self, variant: str) -> bool:
        """Whether ranks must talk to each other for the outputs of a split batch: they share the loss among them."""
        return self._loss is not None and self._loss.is_own and self._loss.is_weighed(variant)

    def _own_leaf(self, outputs: Sequence[Any]) -> int | None:
        return None if self._loss is None else self._loss.own_leaf(outputs)

    def row_by_row(self) -> AbstractContextManager[None]:
        """Inside, batch norm normalises with fixed statistics: no row reaches another through it."""
        return self._sync_batch_norm.row_by_row()

    def synchronised(self) -> AbstractContextManager[None]:
        """Inside, batch norm normalises over all ranks' rows, whatever the spec says."""
        return self._sync_batch_norm.synchronised()

    def synchronises(self, variant: str) -> bool:
        """Whether ranks that share a batch talk to each other in its batch norm, on the way back too."""
        return self.spec.sync_batch_norm and self.program.has_batch_norm(variant)

    def normalises_apart(self, variant: str) -> bool:
        """Whether ranks that share a batch normalise their own rows each, and so move buffers differently."""
        return not self.spec.sync_batch_norm and self.program.has_batch_norm(variant)

    def _precise(self) -> AbstractContextManager[None]:
        return nullcontext() if self.precision == "fp32" else autocast(self.precision)

    def _groups_of(self, shard: Shard) -> ProcessGroups | None:
        return None if shard.whole else self.groups

    @contextmanager
    def _over_ranks(self, shard: Shard) -> Iterator[None]:
        groups = self._groups_of(shard)
        if groups is None:
            yield
            return
        with self._sync_batch_norm.over_ranks(groups, has_rows=shard.count > 0):
            yield

    def moved(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Leaves on this rank's device."""
        return tuple(to_device(leaf, self.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
