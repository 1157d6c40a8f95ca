"""A training step that evaluates its batch several times, with other weights each time: LBFGS's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradwire_workers.shard import Shard
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.passes import Passes, take
from gradwire_workers.training.updater import Update, Updater


def search(
    updater: Updater, passes: Passes, agreement: Agreement, shard: Shard, *, command: int, lr: float | None
) -> tuple[float, Update]:
    """(the loss before the step, what the update used). All ranks together; weights, buffers and state change, or none.

    `shard` is on the rank's device.
    """
    groups = passes.groups
    buffers: list[tuple[Tensor, Tensor]] = []

    def evaluate() -> tuple[float, Sequence[Tensor | None]]:
        done = passes.summed(shard, command)
        return agreement.reach(groups, done.value, done.gradients), done.gradients

    def settle() -> None:
        buffers.extend(passes.shared_buffers(shard))
        agreement.reach(groups)

    with Attempt(groups, passes.changed_by(shard)):
        loss, gradients = evaluate()
        update = updater.search(gradients, loss, evaluate, settle, lr=lr)
    take(buffers)
    return loss, update
