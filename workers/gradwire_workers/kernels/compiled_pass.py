"""A training pass on compiled kernels: what `Passes` computes eagerly, for shards of just one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradwire_proto.tensors import torch_dtype
from gradwire_workers.kernels.pass_trace import PassForm
from gradwire_workers.shard import Shard
from gradwire_workers.training.replica import Replica


class CompiledPass:
    """See the module. `call`: the kernels. `trained`: the parameters whose gradients it gives, in their order."""

    def __init__(
        self, call: Callable[..., Sequence[Tensor]], form: PassForm, replica: Replica, trained: Sequence[nn.Parameter]
    ) -> None:
        assert len(form.reached) == len(trained)
        self._call = call
        self._form = form
        self._replica = replica
        # They are changed in place alone.
        self._state = [each.detach() for each in replica.program.all_state().values()]
        self._loss_type = torch_dtype(form.loss)
        # What is looked at of outputs before they are there.
        self._outputs = [
            None if each is None else torch.empty((), dtype=torch_dtype(each[0]), device=replica.device).expand(each[1])
            for each in form.outputs
        ]

    def __call__(self, shard: Shard) -> tuple[Tensor, list[Tensor | None]]:
        """(what the rank adds to the loss, the gradients, scaled). In a split batch, every rank at the same time."""
        replica = self._replica
        replica.check_targets(shard, self._outputs)
        is_split = replica.groups is not None and not shard.whole
        divisor = replica.divisor(shard, self._outputs, self._loss_type) if is_split else 1.0
        leaves = [each.contiguous() for each in (*shard.inputs, *shard.targets) if isinstance(each, Tensor)]
        total, *found = self._call(*self._state, *leaves, self._cotangent(shard, divisor))
        gradients = iter(found)
        reached = [next(gradients) if is_reached else None for is_reached in self._form.reached]
        return total / divisor if shard.count else torch.zeros_like(total), reached

    def _cotangent(self, shard: Shard, divisor: Tensor | float) -> Tensor:
        """A dummy row's loss counts nothing, whatever it is."""
        scale = self._replica.scale if shard.count else 0.0
        if isinstance(divisor, Tensor):
            return (scale / divisor).to(self._loss_type)
        return torch.full((), scale / divisor, dtype=self._loss_type, device=self._replica.device)
