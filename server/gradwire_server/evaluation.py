"""The loss over a dataset, some batches at a time: each time a read of the model. Others have their turn between."""

from __future__ import annotations

from gradwire_proto.errors import GradwireError
from gradwire_server.fit_commands import FitCommands
from gradwire_server.fit_pace import Pace
from gradwire_server.fit_refusals import evaluation_refusal
from gradwire_server.storage.dataset_files import StoredDataset


class Validation:
    """What a fit with so many steps in each epoch is validated on after each of them. dataset: None for nothing."""

    def __init__(self, fitting: FitCommands, dataset: StoredDataset | None, batch_size: int, per_epoch: int) -> None:
        self._fitting = fitting
        self._dataset = dataset
        self._batch_size = batch_size
        self._per_epoch = per_epoch
        self._pace = Pace()

    @property
    def is_wanted(self) -> bool:
        """Whether there is any."""
        return self._dataset is not None

    def comes_after(self, done: int) -> bool:
        """Whether there is a loss to tell after so many steps."""
        return self.is_wanted and done > 0 and done % self._per_epoch == 0

    def after(self, done: int) -> Evaluation:
        """Its evaluation there."""
        assert self._dataset is not None
        return Evaluation(self._fitting, self._dataset, self._batch_size, self._pace, done // self._per_epoch - 1, done)


class Evaluation:
    """See the module. pace: of the batches that were evaluated before, and of these. epoch, done: of the fit."""

    def __init__(
        self, fitting: FitCommands, dataset: StoredDataset, batch_size: int, pace: Pace, epoch: int, done: int
    ) -> None:
        self._fitting = fitting
        self._dataset = dataset
        self._batch_size = batch_size
        self._pace = pace
        self._epoch = epoch
        self._done = done
        self._rows = dataset.info.num_examples
        self._batches = 0
        self._row = 0
        """Rows of the batches that were evaluated."""
        self._total = 0.0

    @property
    def loss(self) -> float | None:
        """The mean over rows of the losses of its batches; None while there are more."""
        return self._total / self._rows if self._row == self._rows else None

    async def go_on(self) -> None:
        """Evaluate the next batches, on the model as it is when their turn comes. Raises what refuses one of them."""
        size, first = self._batch_size, self._batches
        try:
            found = await self._fitting.evaluate(self._dataset, size, first=first, most=self._pace.steps)
        except GradwireError as error:
            raise evaluation_refusal(error, self._epoch, self._done) from None
        self._pace.took(len(found.losses), found.seconds)
        for loss in found.losses:
            rows = min(size, self._rows - self._row)
            self._total += loss * rows
            self._row += rows
        self._batches += len(found.losses)
