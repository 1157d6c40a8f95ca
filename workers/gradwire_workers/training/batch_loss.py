"""The loss of a whole batch from a rank's rows, such that the ranks' gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradwire_proto.autocast import autocast
from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import GraphLossSpec, LossSpec, OutputLossSpec, TorchLossSpec
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.losses import NamedLoss, RowSum, Weight
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, row_range
from gradwire_workers.training.loss_weights import LossWeight
from gradwire_workers.training.weighed_loss import weighed


class LocalLoss(NamedTuple):
    """A rank's part of the loss. The gradients of all ranks' `differentiable`, added up, are the whole batch's, scaled.

    value: what this rank adds to the loss, not scaled. Detached.
    """

    differentiable: Tensor
    value: Tensor


class BatchLoss:
    """A model's loss, whichever kind it is, on whole batches and on shards.

    `scale`: what gradients are to be multiplied by, from the loss backwards, as torch.amp.GradScaler.scale does.
    """

    def __init__(self, spec: LossSpec, program: BuiltProgram | ArchitectureProgram, device: torch.device) -> None:
        self._program = program
        self._weights: dict[str, LossWeight] = {}
        self._own_leaf = spec.output_leaf if isinstance(spec, OutputLossSpec) else None
        self._kind: _Kind
        match spec:
            case TorchLossSpec():
                self._kind = _ByName(NamedLoss(spec, device))
            case GraphLossSpec():
                assert isinstance(program, BuiltProgram), "the frontend refuses graphs of architectures"
                self._kind = _ByGraph(program)
            case OutputLossSpec():
                self._kind = _ByOutput(spec.output_leaf)

    def own_leaf(self, outputs: Sequence[Any]) -> int | None:
        """The leaf of a variant's outputs that is the loss; None where they have none."""
        leaf = self._own_leaf
        if leaf is None or leaf >= len(outputs) or not isinstance(outputs[leaf], Tensor) or outputs[leaf].dim() > 0:
            return None
        return leaf

    @property
    def is_own(self) -> bool:
        """Whether programs return the loss themselves."""
        return self._own_leaf is not None

    def weigh(self, variant: str, weight: LossWeight | None) -> None:
        """From here on, losses of shards of the variant are combined by this weight; None: as the loss's kind tells."""
        if weight is None:
            self._weights.pop(variant, None)
        else:
            self._weights[variant] = weight

    def weight_of(self, variant: str) -> LossWeight | None:
        """What `weigh` was given last for the variant."""
        return self._weights.get(variant)

    def is_weighed(self, variant: str) -> bool:
        """Whether losses of shards of the variant are combined by a weight."""
        return variant in self._weights

    def of_whole(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any], scale: float = 1.0) -> LocalLoss:
        """The loss of a batch that this rank has in full."""
        loss = _scalar(self._kind.whole(variant, outputs, targets))
        return LocalLoss(differentiable=_scaled(loss, scale), value=loss.detach())

    def of_shard(
        self,
        shard: Shard,
        outputs: Sequence[Any],
        targets: Sequence[Any],
        groups: ProcessGroups,
        scale: float = 1.0,
        *,
        seed_alike: Callable[[], None],
    ) -> LocalLoss:
        """The loss of a batch whose rows are spread over the ranks. Every rank calls it.

        seed_alike: makes all ranks draw the same random numbers from then on. For where each computes the whole.
        """
        weight = self._weights.get(shard.variant)
        if weight is not None:
            loss = _scalar(self._kind.whole(shard.variant, outputs, targets))
            differentiable, value = weighed(loss, weight, shard, groups)
            return LocalLoss(differentiable=_scaled(differentiable, scale), value=value)
        specs = self._program.variant(shard.variant).target_leaves
        # Targets that are not split fit a shard by chance, if they do.
        part = self._kind.over_rows(shard.variant, outputs, targets) if all(map(has_rows, specs)) else None
        if part is not None:
            return _of_row_sum(part, shard, groups, scale)
        seed_alike()
        return self._of_gathered(shard, outputs, targets, groups, scale)

    def is_sum(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> bool:
        """Whether the loss is a sum of the ranks' losses, and computed as such."""
        return variant in self._weights or self._kind.over_rows(variant, outputs, targets) is not None

    def check(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """Refuse targets whose values have no place in such outputs."""
        self._kind.check(outputs, targets)

    def trust_targets(self) -> None:
        """Look at no target's value from here on: for a trace, which has none."""
        if isinstance(self._kind, _ByName):
            self._kind.loss.looks_at_targets = False

    def row_total(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Tensor | None:
        """The loss over a shard's rows before it is divided by what all rows weigh; None where it is no such sum."""
        specs = self._program.variant(variant).target_leaves
        part = self._kind.over_rows(variant, outputs, targets) if all(map(has_rows, specs)) else None
        return None if part is None else part.total

    def divisor(
        self, shard: Shard, outputs: Sequence[Any], targets: Sequence[Any], groups: ProcessGroups, total: torch.dtype
    ) -> Tensor | float:
        """What `row_total` of a shard, which is of type `total`, is divided by. Every rank calls it.

        Of the outputs, types and shapes are looked at.
        """
        assert isinstance(self._kind, _ByName), "only losses by name are sums over rows"
        return _divisor(self._kind.weight(outputs, targets), shard, total, groups)

    def _of_gathered(
        self, shard: Shard, outputs: Sequence[Any], targets: Sequence[Any], groups: ProcessGroups, scale: float
    ) -> LocalLoss:
        """Every rank computes the whole loss from everybody's outputs, and takes the gradient of its own rows."""
        specs = self._program.variant(shard.variant).target_leaves
        everything = [
            gather_rows(leaf.detach(), shard, groups).requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in outputs
        ]
        all_targets = [
            gather_rows(leaf, shard, groups) if has_rows(spec) else leaf
            for leaf, spec in zip(targets, specs, strict=True)
        ]
        with torch.enable_grad():
            loss = _scalar(self._kind.whole(shard.variant, everything, all_targets))
        value = loss.detach() if groups.rank == 0 else torch.zeros_like(loss, requires_grad=False)
        if not loss.requires_grad:
            return LocalLoss(differentiable=loss, value=value)
        mine = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
        theirs = [leaf for leaf in everything if isinstance(leaf, Tensor) and leaf.requires_grad]
        own = [each for each in self._program.parameters() if each.requires_grad]
        # A backward, and what stands for its result, are no part of what autocast is for.
        with autocast("fp32"):
            gradients = torch.autograd.grad(_scaled(loss, scale), [*theirs, *own], allow_unused=True)
            return LocalLoss(differentiable=_stand_in(mine, own, gradients, shard, groups), value=value)


def _stand_in(
    mine: Sequence[Tensor],
    own: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    shard: Shard,
    groups: ProcessGroups,
) -> Tensor:
    """A scalar that has the gradients of the whole batch with respect to `mine`, this rank's outputs, and `own`."""
    terms = []
    for leaf, gradient in zip(mine, gradients[: len(mine)], strict=True):
        if gradient is not None:
            terms.append(_linear(leaf, gradient[shard.start : shard.stop] if shard.count else None))
    for parameter, gradient in zip(own, gradients[len(mine) :], strict=True):
        if gradient is not None:
            # The loss's own parameters: every rank has their whole gradient, one counts.
            terms.append(_linear(parameter, gradient if groups.rank == 0 else None))
    return torch.stack(terms).sum()


def _scaled(loss: Tensor, scale: float) -> Tensor:
    return loss if scale == 1.0 else loss * torch.tensor(scale, dtype=torch.float32, device=loss.device)


def gather_rows(leaf: Tensor, shard: Shard, groups: ProcessGroups) -> Tensor:
    """All ranks' rows of a leaf, in order. gloo gathers equal shapes of some types: so padded, and as bytes."""
    most = row_range(shard.rows, groups.size, 0)[1]
    padded = leaf.new_zeros((most, *leaf.shape[1:]))
    padded[: shard.count] = leaf[: shard.count]
    everyone = groups.all_gather(padded.reshape(-1).view(torch.uint8)).view(leaf.dtype)
    everyone = everyone.view(groups.size, *padded.shape)
    ranges = (row_range(shard.rows, groups.size, rank) for rank in range(groups.size))
    return torch.cat([everyone[rank, : stop - start] for rank, (start, stop) in enumerate(ranges)])


def _of_row_sum(part: RowSum, shard: Shard, groups: ProcessGroups, scale: float) -> LocalLoss:
    total = part.total
    if part.weight is not None:
        total = total / _divisor(part.weight, shard, total.dtype, groups)
    value = total.detach() if shard.count else torch.zeros_like(total, requires_grad=False)
    return LocalLoss(differentiable=_scaled(total, scale), value=value)


def _divisor(weight: Weight | None, shard: Shard, dtype: torch.dtype, groups: ProcessGroups) -> Tensor | float:
    """What the ranks' sums over rows are divided by, in their type. `weight`: of this rank's rows."""
    if weight is None:
        return 1.0
    if not isinstance(weight, Tensor):
        # The same for every row, so that each rank knows it for all.
        return weight / max(shard.count, 1) * shard.rows
    weight = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    return groups.all_reduce(weight if shard.count else weight.zero_()).to(dtype)


def _linear(leaf: Tensor, gradient: Tensor | None) -> Tensor:
    """A scalar whose gradient with respect to `leaf` is `gradient`, zeros for None."""
    product = leaf * (torch.zeros_like(leaf) if gradient is None else gradient.conj())
    return product.sum().real if product.is_complex() else product.sum()


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        found = f"{str(loss.dtype)[6:]}{list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidArgument(
            f"the loss must be one real number, got {found}", field="model.loss", reason="LOSS_NOT_SCALAR"
        )
    return loss.reshape(()) if loss.dim() else loss


class _Kind(Protocol):
    def whole(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Any: ...

    def over_rows(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> RowSum | None: ...

    def check(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None: ...


class _ByName:
    def __init__(self, loss: NamedLoss) -> None:
        self.loss = loss

    def whole(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        return self.loss.whole(*self._pair(outputs, targets))

    def over_rows(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> RowSum | None:
        return self.loss.over_rows(*self._pair(outputs, targets))

    def weight(self, outputs: Sequence[Any], targets: Sequence[Any]) -> Weight | None:
        return self.loss.weight(*self._pair(outputs, targets))

    def check(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        self.loss.check(*self._pair(outputs, targets))

    def _pair(self, outputs: Sequence[Any], targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
        if len(outputs) == len(targets) == 1 and isinstance(outputs[0], Tensor) and isinstance(targets[0], Tensor):
            return outputs[0], targets[0]
        for leaves, field in ((outputs, "model.loss.torch.name"), (targets, "batch.targets")):
            if len(leaves) != 1 or not isinstance(leaves[0], Tensor):
                raise InvalidArgument(
                    f"{self.loss.name} takes one output and one target, got {len(outputs)} and {len(targets)}",
                    field=field,
                    reason="LOSS_DOES_NOT_FIT",
                )
        raise AssertionError("one of them is no single tensor")


class _ByGraph:
    def __init__(self, program: BuiltProgram) -> None:
        self._program = program

    def whole(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        return self._program.loss(variant, outputs, targets)

    def over_rows(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        return None  # what a graph computes is not known to be a sum over rows

    def check(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        pass  # a graph's operators check for themselves


class _ByOutput:
    def __init__(self, leaf: int) -> None:
        self._leaf = leaf

    def whole(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> Any:
        if self._leaf >= len(outputs):
            raise FailedPrecondition(
                f"variant {variant!r} has no output leaf {self._leaf} to take for the loss", reason="NO_LOSS"
            )
        return outputs[self._leaf]

    def over_rows(self, variant: str, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        return None

    def check(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        pass  # there are no targets to check
