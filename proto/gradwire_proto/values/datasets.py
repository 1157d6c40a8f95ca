"""Data that stays on the service, and what a fit does with it."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_proto.errors import GradwireError
from gradwire_proto.values.results import Timing
from gradwire_proto.values.tensors import Value

_NO_TIME = Timing()


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """Examples that stay on the service. In `inputs` and `targets`, nested as a batch's, tensors have no bytes.

    num_examples: rows of every tensor. nbytes: of all tensors. created_at: seconds since 1970. ttl: seconds that it
    stays while no fit uses it; None: for good.
    """

    id: str
    inputs: Value
    targets: Value
    num_examples: int
    nbytes: int
    created_at: float
    ttl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """What is asked of Fit; see its request. `dataset`, `validation`: ids. batch_size: None for all rows."""

    dataset: str
    epochs: int
    batch_size: int | None = None
    shuffle: bool = False
    seed: int = 0
    validation: str | None = None
    completed_steps: int = 0
    stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSteps:
    """Some steps of a fit: one command. See FitStepsRequest.

    fit: the request id of the fit. seed: of the order of rows in its epoch 0; None: as they are stored, or, in records
    of older versions, `rows`: those of their batches, 4 bytes each.
    """

    fit: str
    dataset: DatasetInfo
    first_step: int
    steps: int
    batch_size: int
    seed: int | None = None
    rows: bytes = b""
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsResult:
    """What some steps of a fit gave. losses: of those applied. error: why the step behind them was refused.

    fit, first_step, validation_loss: as in FitSteps.
    """

    losses: tuple[float, ...]
    step: int
    timing: Timing = _NO_TIME
    error: GradwireError | None = None
    fit: str = ""
    first_step: int = 0
    validation_loss: float | None = None

    @property
    def end(self) -> int:
        """Steps of the fit that were applied after these, counted from its beginning."""
        return self.first_step + len(self.losses)

    @property
    def commands(self) -> int:
        """Each step counts as the command that TrainStep is."""
        return len(self.losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLosses:
    """The losses of some batches. seconds: that the slowest rank took for them."""

    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProgress:
    """Some steps of a fit as they are told, the validation loss after `epoch`, or neither; see FitResponse."""

    first_step: int
    losses: tuple[float, ...] = ()
    step: int = 0
    epoch: int = 0
    validation_loss: float | None = None
    timing: Timing = _NO_TIME
    done: bool = False
