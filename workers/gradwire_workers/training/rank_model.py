"""What a rank has of a model, and how it joins the other ranks. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import Limits, ModelSpec
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.held_gradients import HeldGradients
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.passes import Passes
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.retained_forwards import RetainedForwards
from gradwire_workers.training.trainable import trained_parameters
from gradwire_workers.training.updater import Updater
from gradwire_workers.training.updater_making import make_updater


class RankModel:
    """One rank's replica, the gradients that it holds, and its optimizer's state.

    `state` must be writable and nobody else's; `groups` None: there is no other rank. `weights_folder`: where an
    architecture may find its first weights.
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        state: dict[str, Tensor],
        rank: int = 0,
        groups: ProcessGroups | None = None,
        device: str = "cpu",
        limits: Limits | None = None,
        weights_folder: str | None = None,
    ) -> None:
        self.step = 0
        """Updates applied."""
        self._limits = limits or Limits()
        self._replica = Replica(spec, state, rank, torch.device(device), self._limits, weights_folder)
        self._program = self._replica.program
        self._spec = spec
        trainable = trained_parameters(self._program)
        self._trainable = list(trainable.values())
        self._loss_scale = LossScale() if spec.precision == "fp16" else None
        self._updater = make_updater(spec, trainable, self._aliases(), self._loss_scale)
        self._agreement = Agreement(refuses_nan=spec.on_nan == "refuse")
        self._passes = Passes(self._replica, self._trainable)
        self._held = HeldGradients(self._trainable)
        self._retained = RetainedForwards(self._replica, self._passes, self._limits)
        self._replica.groups = groups

    @property
    def needs_rejoin(self) -> bool:
        """Whether a command has failed on some rank, so that all must rejoin before the next."""
        return self._groups is not None and self._groups.failed

    def rejoin(self, epoch: int) -> None:
        """Join the other ranks again, who do the same at the same time. `epoch` must be new."""
        assert self._groups is not None, "a single rank has nobody to rejoin"
        self._passes.drop()
        self._retained.release_connected()
        self._replica.groups = self._groups.rejoin(epoch)

    def break_off(self, cause: str) -> None:
        """Make what the other ranks wait for fail at once: this one will not do its part."""
        if self._groups is not None:
            self._groups.abort(cause)

    def close(self) -> None:
        """Leave the other ranks and let go of every tensor. Nothing else may be called after it."""
        self._passes.drop()
        if self._groups is not None:
            self._groups.leave()
        self.__dict__.clear()

    @property
    def _groups(self) -> ProcessGroups | None:
        return self._replica.groups

    def _aliases(self) -> dict[str, nn.Parameter]:
        """Parameters under every name that they have."""
        return {name: each for name, each in self._program.state_tensors().items() if isinstance(each, nn.Parameter)}

    def _checked_updater(self) -> Updater:
        if self._updater is None:
            raise FailedPrecondition("the model has no optimizer: give one to create_model", reason="NO_OPTIMIZER")
        return self._updater

    def _localised(self, shard: Shard) -> Shard:
        """The shard on this rank's device, for a backward that starts with the loss scale of now."""
        self._replica.scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        return self._replica.localise(shard)

    def _judged(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Those that must be finite where the model refuses others: none where a loss scale is still to be found."""
        return gradients if self._loss_scale is None else ()

    @property
    def _reported_scale(self) -> float | None:
        return None if self._loss_scale is None or self._updater is None else self._loss_scale.value
