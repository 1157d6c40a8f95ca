"""Updates of a rank's parameters from gradients that every rank has: clipping, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition, InternalError, InvalidArgument
from gradwire_proto.values import OptimizerSpec
from gradwire_workers.optimizers import check_learning_rate, learning_rate, make_optimizer, optimizer_kind
from gradwire_workers.schedules import make_schedule
from gradwire_workers.training.agreement import are_finite
from gradwire_workers.training.bare_step import BareStep
from gradwire_workers.training.clipping import Clipping
from gradwire_workers.training.first_step import first_states
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.optimizer_state import OptimizerState
from gradwire_workers.training.option_check import check_options
from gradwire_workers.training.schedule import Moment

Gradients = Sequence[Tensor | None]
Evaluate = Callable[[], tuple[float, Gradients]]
"""Computes loss and gradients of the batch once more, with the parameters as they are now."""


class Update(NamedTuple):
    """What an update used. `grad_norm`: before clipping; None where nothing is clipped.

    skipped: gradients had overflowed, so that nothing changed but the loss scale.
    """

    lr: float
    grad_norm: float | None
    skipped: bool = False


class Updater:
    """The optimizer of `parameters`, by name, with its schedule. `aliases`: every name that a parameter has.

    Gradients are given in the order of `parameters`; one without a gradient is left alone. All ranks do the same.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        clipping: Clipping,
        parameters: Mapping[str, nn.Parameter],
        aliases: Mapping[str, nn.Parameter],
        loss_scale: LossScale | None = None,
        *,
        field: str = "model.optimizer",
    ) -> None:
        kind = self._kind = optimizer_kind(spec.name, field=f"{field}.name")
        self.held = dict(parameters)
        """What the optimizer holds, by name: those that it updates, and what was frozen since."""
        self._parameters = list(parameters.values())
        self._clipping = clipping
        self._optimizer = make_optimizer(spec, parameters, aliases, field=field)
        self._step = BareStep(self._optimizer)
        self.searches = isinstance(self._optimizer, torch.optim.LBFGS)
        """Whether an update evaluates the batch again."""
        self._schedule = None
        if spec.schedule is not None:
            self._schedule = make_schedule(spec.schedule, self._optimizer, field=f"{field}.schedule")
        self._state = OptimizerState(kind, self._optimizer, self._schedule, parameters, loss_scale)
        self._loss_scale = loss_scale

    @property
    def lr(self) -> float:
        """The first group's learning rate in the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, lr: float) -> None:
        """Give all parameter groups this learning rate. The schedule's next step works on it as torch's would."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def update_only(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Update these of the parameters held, given in this order, and leave the others and their state alone."""
        self._parameters = list(parameters.values())

    def updates_exactly(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether these are what is updated now."""
        return {id(each) for each in self._parameters} == {id(each) for each in parameters.values()}

    def go_on_from(self, other: Updater) -> None:
        """Take over state, options and schedule of one with fewer parameters, for those that both hold.

        LBFGS has one state for all: of it, only options and schedule are taken, whichever parameters the other held.
        InvalidArgument SCHEDULE_UNFIT where parameters make a group that is not in the other's schedule.
        """
        old, new = other._optimizer.param_groups, self._optimizer.param_groups
        if self._schedule is not None and len(new) != len(old):
            raise InvalidArgument(
                "the schedule has no learning rate for the parameters that no group of the optimizer matches: give the"
                " optimizer anew, too",
                field="trainable",
                reason="SCHEDULE_UNFIT",
            )
        if self._schedule is not None and other._schedule is not None:
            for scheduler, counters in self._schedule.load(other._schedule.state(), field="schedule"):
                scheduler.__dict__.update(counters)
        for group in old:
            heir = new[0] if self.searches else next(each for each in new if _has(each, group["params"][0]))
            heir.update({name: value for name, value in group.items() if name != "params"})
        if not self.searches:
            self._optimizer.state.update(other._optimizer.state)

    def check(self, lr: float | None, *, has_batch: bool) -> None:
        """Refuse an update that would need a batch, for its loss, where there is none; or with a wrong `lr`."""
        check_learning_rate(lr)
        if has_batch:
            return
        if self.searches:
            raise FailedPrecondition(
                "LBFGS evaluates the loss several times in a step, which takes a batch: use train_step",
                reason="OPTIMIZER_NEEDS_BATCH",
            )
        if self._schedule is not None and self._schedule.needs_loss:
            raise FailedPrecondition(
                "ReduceLROnPlateau takes its steps by the loss, and optimizer_step computes none: use train_step",
                reason="SCHEDULE_NEEDS_LOSS",
            )

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse options that the parameter groups could not take; none at all are taken.

        InvalidArgument at groups[i]["x"]; FailedPrecondition SCHEDULE_SETS_OPTIONS where a schedule would undo them.
        """
        if not groups:
            return
        if self._schedule is not None:
            message = "the model's schedule sets its options: make the model without one"
            raise FailedPrecondition(message, reason="SCHEDULE_SETS_OPTIONS")
        known = self._optimizer.param_groups
        if len(groups) != len(known):
            message = f"expected {len(known)} groups, as the optimizer has, got {len(groups)}"
            raise InvalidArgument(message, field="groups", reason="OPTION_OUT_OF_RANGE")
        for index, (options, group) in enumerate(zip(groups, known, strict=True)):
            if options:
                self._check_options(options, group, f"groups[{index}]")

    def take_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Give the parameter groups options that were checked."""
        for group, options in zip(self._optimizer.param_groups, groups, strict=False):
            group.update(options)

    def plan(self, loss: float | None = None) -> Moment | None:
        """The learning rates after an update with this loss. Changes nothing. FailedPrecondition SCHEDULE_FAILED."""
        return None if self._schedule is None else self._schedule.plan(loss)

    def apply(
        self, gradients: Gradients, *, lr: float | None, plan: Moment | None, keep: bool = False, given: bool = False
    ) -> Update:
        """Update with gradients that every rank has; where their loss was scaled and they overflowed, skip that.

        keep: the gradients must stay as they are. given: they are the client's, of no loss that was scaled.
        """
        scale = None if given else self._loss_scale
        overflowed = scale is not None and not are_finite(gradients)
        if keep and self._clipping:
            gradients = [None if each is None else each.clone() for each in gradients]
        try:
            used, norm = self._apply(gradients, lr, overflowed)
        except Exception as error:
            # The other ranks have updated, and this one in part.
            raise InternalError(
                f"the update failed halfway: {error}", reason="UPDATE_TORN", outcome="unknown"
            ) from error
        if scale is not None:
            scale.update(overflowed=overflowed)
        if not overflowed:
            self._take(plan)
        return Update(used, norm, overflowed)

    def search(
        self, gradients: Gradients, loss: float, evaluate: Evaluate, settle: Callable[[], None], *, lr: float | None
    ) -> Update:
        """Update with an optimizer that evaluates the batch again; the first time it has `gradients` and `loss`.

        `settle` is called at the end. What the two raise comes out; then the caller must put back the parameters: all
        else is as it was.
        """
        plan = self.plan(loss)
        norms: list[float | None] = []

        def closure() -> Tensor:
            # A backward pass over several ranks adds to the gradients that it finds.
            self._drop_gradients()
            value, found = (loss, gradients) if not norms else evaluate()
            norms.append(self._hand_over(found))
            return torch.tensor(value, dtype=torch.float64)

        try:
            with self._put_back_on_error(), learning_rate(self._optimizer, lr) as used:
                self._optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
                settle()
        finally:
            self._drop_gradients()
        self._take(plan)
        return Update(used, norms[0])

    def state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, and the schedule's. Tensors are live."""
        return self._state.read()

    def load(self, state: Any) -> None:
        """Replace both, or neither. InvalidArgument OPTIMIZER_STATE_MISMATCH at the path of what does not fit."""
        self._state.load(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` of another gave, bit for bit; this one was just made."""
        self._state.restore(state)

    def _check_options(self, options: Mapping[str, Any], group: Mapping[str, Any], field: str) -> None:
        owner = f"a group of torch.optim.{self._kind.name}"
        check_options(options, self._kind.group_options, field=field, owner=owner)
        before = {name: value for name, value in group.items() if name in self._kind.options}
        kept, needed = (
            first_states(self._kind.make, each, group["params"], owner=owner, field=field)
            for each in (before, {**before, **options})
        )
        # SGD alone can begin to keep something later.
        if self._kind.name != "SGD" and any(new.keys() - old.keys() for old, new in zip(kept, needed, strict=True)):
            message = f"{owner} would need state that it has not kept from the beginning"
            raise InvalidArgument(message, field=field, reason="OPTIMIZER_UNFIT")

    def _apply(self, gradients: Gradients, lr: float | None, overflowed: bool) -> tuple[float, float | None]:
        """Clip and, unless they overflowed, update. Returns learning rate and norm, as an Update has them."""
        if lr is None and not overflowed and not self._clipping and self._step.is_plain:
            self._step.plain(self._parameters, gradients)
            return self.lr, None
        try:
            norm = self._hand_over(gradients)
            with learning_rate(self._optimizer, lr) as used:
                if not overflowed:
                    self._step()
        finally:
            self._drop_gradients()
        return used, norm

    def _hand_over(self, gradients: Gradients) -> float | None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return self._clipping.apply(self._parameters) if self._clipping else None

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _take(self, plan: Moment | None) -> None:
        if plan is not None:
            assert self._schedule is not None
            self._schedule.take(plan)

    @contextmanager
    def _put_back_on_error(self) -> Iterator[None]:
        kept = {parameter: deepcopy(state) for parameter, state in self._optimizer.state.items()}
        try:
            yield
        except BaseException:
            self._optimizer.state.clear()
            self._optimizer.state.update(kept)
            raise


def _has(group: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    return any(each is parameter for each in group["params"])
