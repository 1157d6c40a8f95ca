"""What a rank computes of a batch: outputs, its part of the loss, and gradients, its own or all ranks' sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import Variant
from gradwire_workers.kernels.compiled_pass import CompiledPass
from gradwire_workers.kernels.rank_kernels import RankKernels
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.training.gradients import SummingModule, add_up, apart, broadcast, share_memory
from gradwire_workers.training.replica import Replica


class Pass(NamedTuple):
    """A pass over a shard. value: what the rank adds to the loss. gradients: of the tensors that were asked for.

    outputs: None on an idle rank, or where nobody wants them. waited: seconds spent waiting for the summed gradients.
    """

    gradients: list[Tensor | None]
    value: Tensor | float = 0.0
    outputs: list[Any] | None = None
    waited: float = 0.0


class Passes:
    """Passes of one replica, together with those of the other ranks. Gradients come out unscaled.

    kernels: what passes that train may run on.
    """

    def __init__(self, replica: Replica, trainable: Sequence[nn.Parameter], kernels: RankKernels | None = None) -> None:
        self._replica = replica
        self._trainable = trainable
        self._kernels = kernels
        self._summing: SummingModule | None = None
        self._ones: Tensor | None = None

    @property
    def groups(self) -> ProcessGroups | None:
        """The connections to the other ranks; None where there are none."""
        return self._replica.groups

    def variant(self, shard: Shard) -> Variant:
        """The variant that the shard is for."""
        return self._replica.program.variant(shard.variant)

    @property
    def scale(self) -> float:
        """What the next pass scales its loss by: its gradients come out unscaled, unless they overflow."""
        return self._replica.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._replica.scale = scale

    def buffers(self, shard: Shard) -> list[Tensor]:
        """The buffers that a pass changes."""
        return self._replica.program.mutated_buffers(shard.variant)

    def changed_by(self, shard: Shard) -> list[Tensor]:
        """What passes and updates change: the variant's buffers, and the trainable parameters."""
        return [*self.buffers(shard), *(each.detach() for each in self._trainable)]

    def forward(self, shard: Shard, command: int, seed: int | None) -> list[Any] | None:
        """The outputs, without gradients."""
        if shard.idle:
            return None
        self._replica.seed(shard, command, seed)
        with torch.no_grad():
            return self.results(shard, self._replica.outputs(shard))

    def to_learn(self, shard: Shard, command: int) -> Pass:
        """The gradients of this rank's part of the loss with respect to the trainable parameters."""
        kernels = self._kernels_of(shard)
        if kernels is not None:
            return self._compiled(shard, command, kernels)
        return self.local(shard, self._trainable, command, to_learn=True)

    def _kernels_of(self, shard: Shard) -> CompiledPass | None:
        return None if self._kernels is None else self._kernels.of(shard)

    def _compiled(self, shard: Shard, command: int, kernels: CompiledPass) -> Pass:
        """`local`, on kernels."""
        self._replica.seed(shard, command)
        value, gradients = kernels(shard)
        gradients = apart(gradients, self._trainable, copy=self._replica.program.has_functions(shard.variant))
        _unscale(gradients, self._replica.scale)
        return Pass(value=value, gradients=gradients)

    def local(
        self,
        shard: Shard,
        wanted: Sequence[Tensor],
        command: int,
        *,
        seed: int | None = None,
        to_learn: bool = False,
        with_outputs: bool = False,
    ) -> Pass:
        """The gradients of this rank's part of the loss: the ranks' add up to the whole batch's. Never on kernels.

        to_learn: refuse a loss that no parameter moves. with_outputs: give the outputs too.
        """
        if shard.idle:
            return Pass(gradients=[None] * len(wanted))
        self._replica.seed(shard, command, seed)
        outputs, loss = self._replica.outputs_and_loss(shard)
        if to_learn:
            _check_learns(loss.differentiable)
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if loss.differentiable.requires_grad and wanted:
            cotangent = _cotangent(shard, loss.differentiable)
            gradients = torch.autograd.grad(loss.differentiable, wanted, cotangent, allow_unused=True)
            gradients = apart(gradients, wanted, copy=self._replica.program.has_functions(shard.variant))
            _unscale(gradients, self._replica.scale)
        results = self.results(shard, outputs) if with_outputs else None
        return Pass(value=loss.value, gradients=list(gradients), outputs=results)

    def summed(self, shard: Shard, command: int) -> Pass:
        """The gradients of the whole batch with respect to the trainable parameters, on every rank."""
        kernels = self._kernels_of(shard)
        return self.eager(shard, command) if kernels is None else self.compiled(shard, command, kernels)

    def compiled(self, shard: Shard, command: int, kernels: CompiledPass | None) -> Pass:
        """`summed`, on these kernels. None: on a rank that has nothing to compute."""
        if kernels is None:
            done = Pass(gradients=[None] * len(self._trainable))
        else:
            done = self._compiled(shard, command, kernels)
        if self.groups is None:
            return done
        return Pass(value=done.value, gradients=add_up(done.gradients, self._trainable, self.groups))

    def eager(self, shard: Shard, command: int) -> Pass:
        """`summed`, not on kernels."""
        groups = self.groups
        # The sum is written where backward() has left a gradient, which of a custom function may be a parameter.
        if groups is not None and not shard.whole and not self._replica.program.has_functions(shard.variant):
            return self._overlapped(shard, command, groups)
        if groups is None:
            return self._alone(shard, command)
        done = self.local(shard, self._trainable, command, to_learn=True)
        return Pass(value=done.value, gradients=add_up(done.gradients, self._trainable, groups))

    def _alone(self, shard: Shard, command: int) -> Pass:
        """The same on the only rank, where backward() is sooner done than what `local` does."""
        replica = self._replica
        replica.seed(shard, command)
        has_functions = replica.program.has_functions(shard.variant)
        try:
            _, loss = replica.outputs_and_loss(shard)
            _check_learns(loss.differentiable)
            cotangent = torch.ones_like(loss.differentiable) if has_functions else self._one(loss.differentiable)
            _backward(loss.differentiable, cotangent)
            gradients = [each.grad for each in self._trainable]
        finally:
            for each in self._trainable:
                each.grad = None
        # backward() leaves two of them in the same memory where an operator hands out parts, or the same thing twice;
        # or what it began with.
        if has_functions or share_memory([cotangent, *gradients]):
            gradients = apart(gradients, self._trainable, copy=True)
        if replica.scale != 1.0:
            _unscale(gradients, replica.scale)
        return Pass(gradients, loss.value)

    def _one(self, loss: Tensor) -> Tensor:
        """What backward() begins with: the same 1 each time, which only a custom function could change."""
        if self._ones is None or self._ones.dtype is not loss.dtype or self._ones.device != loss.device:
            self._ones = torch.ones_like(loss)
        return self._ones

    def _overlapped(self, shard: Shard, command: int, groups: ProcessGroups) -> Pass:
        if self._summing is None:
            self._summing = SummingModule(self._replica, groups)
        self._replica.seed(shard, command)
        try:
            loss = self._summing(shard)
            _check_learns(loss)
            waited = self._summing.backward(loss, _cotangent(shard, loss))
            value = self._replica.take_value()
            gradients = apart([each.grad for each in self._trainable], self._trainable, copy=False)
            _unscale(gradients, self._replica.scale)
            return Pass(value=value, gradients=gradients, waited=waited)
        except BaseException:
            self.drop()
            raise
        finally:
            for each in self._trainable:
                each.grad = None

    def results(self, shard: Shard, outputs: Sequence[Any]) -> list[Any]:
        """Outputs to give away: of this rank's rows, and apart from tensors that may change when the pass is over."""
        changing = {each.untyped_storage().data_ptr() for each in self._replica.program.mutated_buffers(shard.variant)}
        is_split = self.groups is not None and not shard.whole
        results = []
        for leaf in self._replica.combined_outputs(shard, outputs) if is_split else outputs:
            if isinstance(leaf, Tensor):
                leaf = own_rows(leaf.detach(), shard) if is_split and leaf.dim() else leaf.detach()
                if leaf.untyped_storage().data_ptr() in changing:
                    leaf = leaf.clone()
            results.append(leaf)
        return results

    def drop(self) -> None:
        """Forget what is bound to the process group. After a failure, and before the group is left."""
        if self._summing is not None:
            self._summing.drop()
            self._summing = None

    def shared_buffers(self, shard: Shard) -> list[tuple[Tensor, Tensor]]:
        """(tensor, the value that it takes) for those that rank 0 has changed otherwise than this rank.

        In a batch that was not split, and where batch norm has seen each rank's own rows: all have rank 0's then, as
        with DDP's broadcast_buffers.
        """
        if self.groups is None or not (shard.whole or self._replica.normalises_apart(shard.variant)):
            return []
        mutated = self._replica.program.mutated_buffers(shard.variant)
        received = broadcast(mutated, self.groups)
        return list(zip(mutated, received, strict=True)) if self.groups.rank else []


def own_rows(tensor: Tensor, shard: Shard) -> Tensor:
    """Without the dummy row of a rank that has none."""
    return tensor if shard.count else tensor[:0]


def take(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give tensors their new values."""
    if not changes:
        return
    with torch.no_grad():
        for tensor, value in changes:
            tensor.copy_(value)


def _check_learns(loss: Tensor) -> None:
    """Refuse to train on a loss that no parameter moves, as backward() does."""
    if not loss.requires_grad:
        raise FailedPrecondition(
            "the loss depends on no parameter that requires a gradient", reason="LOSS_WITHOUT_GRADIENT"
        )


def _backward(loss: Tensor, cotangent: Tensor) -> None:
    """loss.backward(cotangent), less what that looks at first, which takes as long as a small layer."""
    _ENGINE.run_backward((loss,), (cotangent,), False, False, (), allow_unreachable=True, accumulate_grad=True)


_ENGINE: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]


def _unscale(gradients: Sequence[Tensor | None], scale: float) -> None:
    """Divide out, in place, what the loss was scaled by."""
    if scale == 1.0:
        return
    # In the types in which torch.amp.GradScaler computes it.
    inverse = torch.tensor(scale, dtype=torch.float64).reciprocal().to(torch.float32).item()
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(inverse)


def _cotangent(shard: Shard, loss: Tensor) -> Tensor:
    """A dummy row's loss counts nothing, whatever it is."""
    return torch.ones_like(loss) if shard.count else torch.zeros_like(loss)
