"""What a fit is asked for, and what is brought to the service before it begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from gradwire.arguments import argument_of, as_bool, as_count, as_function, as_int, as_iterator, wrong_type
from gradwire.datasets import Dataset, Lent, has_targets
from gradwire.deadline import Deadline
from gradwire.errors import FailedPrecondition, GradwireError, InvalidArgument
from gradwire.fit import Callback, Fit
from gradwire.fit_progress import ProgressLine
from gradwire.fit_results import FitResult
from gradwire.rpc import Rpc
from gradwire.variants import Variants
from gradwire_proto.values import FitPlan, LossSpec, TorchLossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FitArguments:
    """The arguments of `Model.fit`, checked."""

    data: Any
    epochs: int
    batch_size: int | None
    shuffle: bool
    seed: int
    validation: Any
    callbacks: Sequence[Callback]
    progress: bool

    @classmethod
    def checked(
        cls,
        data: Any,
        *,
        epochs: int,
        batch_size: int | None,
        shuffle: bool,
        seed: int,
        validation: Any,
        callbacks: Sequence[Callback],
        progress: bool,
    ) -> FitArguments:
        """The same, or InvalidArgument for what cannot be one of them."""
        count = as_count(epochs, "epochs")
        if count is None:
            raise wrong_type(epochs, "epochs", "an int")
        return cls(
            data=data,
            epochs=count,
            batch_size=as_count(batch_size, "batch_size"),
            shuffle=as_bool(shuffle, "shuffle"),
            seed=as_int(seed, "seed"),
            validation=validation,
            callbacks=[
                as_function(each, f"callbacks[{index}]")
                for index, each in enumerate(as_iterator(callbacks, "callbacks", "a list of functions"))
            ],
            progress=as_bool(progress, "progress"),
        )

    def run(self, rpc: Rpc, model_id: str, variants: Variants, loss: LossSpec | None) -> FitResult:
        """Bring the data where it is needed, and train. loss: the model's."""
        self._check_loss(loss)
        with ExitStack() as lent:
            with _named("data"):
                dataset = lent.enter_context(Lent(rpc, self.data, "data"))
            validation = None
            if self.validation is not None:
                with _named("validation"):
                    validation = lent.enter_context(Lent(rpc, self.validation, "validation"))
            size = min(self.batch_size or len(dataset), len(dataset))
            deadline = Deadline(rpc.timeout)
            with _named("data"):
                _bring_variants(variants, dataset, size, deadline, training=True)
            if validation is not None:
                with _named("validation"):
                    _bring_variants(variants, validation, size, deadline, training=False)
            plan = FitPlan(
                dataset=dataset.id,
                epochs=self.epochs,
                batch_size=size,
                shuffle=self.shuffle,
                seed=self.seed,
                validation=None if validation is None else validation.id,
            )
            fit = Fit(rpc, model_id, plan, per_epoch=-(-len(dataset) // size))
            callbacks = list(self.callbacks)
            if self.progress and sys.stderr.isatty():
                callbacks.append(lent.enter_context(ProgressLine(fit.total)))
            return fit.run(callbacks)

    def _check_loss(self, loss: LossSpec | None) -> None:
        """Better known before the data is brought than after it."""
        if loss is None:
            raise FailedPrecondition("the model has no loss: give one to create_model", reason="NO_LOSS")
        given = {"data": self.data} | ({} if self.validation is None else {"validation": self.validation})
        for name, examples in given.items():
            if not has_targets(examples, name) and isinstance(loss, TorchLossSpec):
                message = f"{loss.name} needs targets: give (inputs, targets), or a Dataset that has them"
                raise InvalidArgument(message, field=name, reason="LOSS_DOES_NOT_FIT")


def _bring_variants(
    variants: Variants, dataset: Dataset, batch_size: int, deadline: Deadline, *, training: bool
) -> None:
    """See that the service has a graph for every size of batch that comes."""
    rest = len(dataset) % batch_size
    for rows in dict.fromkeys(each for each in (min(batch_size, len(dataset)), rest) if each):
        variants.ensure(dataset.described(rows), lambda rows=rows: dataset.example(rows), deadline, training=training)


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Inside, what is wrong with a batch of this argument is told by the argument's name."""
    try:
        yield
    except GradwireError as error:
        error.field = argument_of(error.field, {"batch": argument})
        raise
