"""What a rank has of a model, and how it joins the other ranks. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import Limits, ModelSpec
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.kernels.rank_kernels import RankKernels
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.held_gradients import HeldGradients
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.model_state import SavedState
from gradwire_workers.training.passes import Passes
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.retained_forwards import RetainedForwards
from gradwire_workers.training.trainable import trained_parameters
from gradwire_workers.training.updater import Updater
from gradwire_workers.training.updater_making import make_updater, restored_updater


class RankModel:
    """One rank's replica, the gradients that it holds, and its optimizer's state.

    `state` must be writable and nobody else's; `groups` None: there is no other rank. `weights_folder`: where an
    architecture may find its first weights; `kernels_folder`: where kernels are compiled. `saved`: the model goes on
    from there, and `state` has all its tensors.
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
        kernels_folder: str | None = None,
        saved: SavedState | None = None,
    ) -> None:
        self.step = 0 if saved is None else saved.step
        """Updates applied."""
        self._limits = limits or Limits()
        self._replica = Replica(spec, state, rank, torch.device(device), self._limits, weights_folder)
        self._program = self._replica.program
        self._spec = spec
        self._loss_scale = LossScale() if spec.precision == "fp16" else None
        trainable, self._updater = self._begun() if saved is None else self._resumed(saved)
        self._trainable = list(trainable.values())
        self._agreement = Agreement(refuses_nan=spec.on_nan == "refuse")
        self._kernels_folder = None if kernels_folder is None else Path(kernels_folder)
        self._kernels = self._no_kernels()
        self._passes = Passes(self._replica, self._trainable, self._kernels)
        self._held = HeldGradients(self._trainable)
        if saved is not None:
            saved.hold(self._held, trainable)
        self._retained = RetainedForwards(self._replica, self._passes, self._limits)
        self._replica.groups = groups

    def _begun(self) -> tuple[dict[str, nn.Parameter], Updater | None]:
        trained = trained_parameters(self._program)
        return trained, make_updater(self._spec, trained, self._aliases(), self._loss_scale)

    def _no_kernels(self) -> RankKernels | None:
        """Those for the parameters that are trained now, of which there are none yet; None: none are wanted."""
        if not self._spec.compile:
            return None
        return RankKernels(self._replica, self._spec, self._trainable, self._limits, self._kernels_folder)

    def _drop_kernels(self) -> None:
        """Let go of all kernels; others may follow."""
        if self._kernels is not None:
            self._kernels.close()
        self._kernels = self._no_kernels()

    def _resumed(self, saved: SavedState) -> tuple[dict[str, nn.Parameter], Updater | None]:
        trained, parameters = saved.prepare(self._replica), self._program.parameters_by_name()
        updater = restored_updater(self._spec, saved.optimizer, trained, parameters, self._aliases(), self._loss_scale)
        return trained, updater

    def model_state(self) -> dict[str, Any]:
        """All that the model's future depends on, but for what only this rank holds. Live; every rank has the same.

        tensors: by name, all but aliases. written: by variant of an architecture, the names of the buffers it changes.
        """
        program = self._program
        names = {each: name for name, each in program.parameters_by_name().items()}
        is_built = isinstance(program, ArchitectureProgram)
        return {
            "tensors": {name: each.detach() for name, each in program.all_state().items()},
            "optimizer": None if self._updater is None else self._updater.state(),
            "step": self.step,
            "trained": tuple(names[each] for each in self._trainable),
            "written": {name: program.written(name) for name in program.variants} if is_built else {},
        }

    def held_parts(self) -> dict[str, Tensor] | None:
        """This rank's part of the held gradients by name, live; None where none are held on any rank."""
        parts = self._held.parts
        if parts is None:
            return None
        names = {each: name for name, each in self._program.parameters_by_name().items()}
        found = zip(self._trainable, parts, strict=True)
        return {names[each]: part for each, part in found if part is not None}

    @property
    def needs_rejoin(self) -> bool:
        """Whether a command has failed on some rank, so that all must rejoin before the next."""
        return self._groups is not None and self._groups.failed

    def rejoin(self, generation: int) -> None:
        """Join the other ranks again, who do the same at the same time. `generation` must be new."""
        assert self._groups is not None, "a single rank has nobody to rejoin"
        self._passes.drop()
        self._retained.release_connected()
        self._replica.groups = self._groups.rejoin(generation)

    def break_off(self, cause: str) -> None:
        """Make what the other ranks wait for fail at once: this one will not do its part."""
        if self._groups is not None:
            self._groups.abort(cause)

    def close(self) -> None:
        """Leave the other ranks and let go of every tensor. Nothing else may be called after it."""
        self._passes.drop()
        if self._kernels is not None:
            self._kernels.close()
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
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        if self._replica.scale != scale:  # Setting an attribute of a module takes its time.
            self._replica.scale = scale
        return self._replica.localise(shard)

    def _judged(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Those that must be finite where the model refuses others: none where a loss scale is still to be found."""
        return gradients if self._loss_scale is None else ()

    @property
    def _reported_scale(self) -> float | None:
        return None if self._loss_scale is None or self._updater is None else self._loss_scale.value
