"""The calls of a model, returned at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gradwire.autograd_calls import AutogradCalls
from gradwire.calls import Call, ModelCalls
from gradwire.fit import Callback
from gradwire.fit_arguments import FitArguments
from gradwire.fit_results import FitResult
from gradwire.futures import CallQueue, Future
from gradwire.gradient_queries import names_of
from gradwire.optim import Optimizer
from gradwire.rpc import Rpc
from gradwire.step_requests import StepRequests
from gradwire_proto.values import Checkpoint, GradientResult, ModelInfo, StepResult

if TYPE_CHECKING:
    import torch

R = TypeVar("R")


class ModelFutures:
    """The calls of a model, returned at once. They run one after another, in the order in which they were made.

    Arguments and errors are those of `Model`; a call that cannot be made raises from its future too. What a call was
    given has been read when its future is there: tensors that have more than 4 MiB together are sent before that, and
    copied, for they may have to be sent again; a batch that fits no graph of the model is exported first. A blocking
    call runs after those that wait here; in a future's done callback it runs at once instead.
    """

    def __init__(
        self, rpc: Rpc, calls: ModelCalls, autograd: AutogradCalls, queue: CallQueue, steps: StepRequests
    ) -> None:
        self._rpc = rpc
        self._calls = calls
        self._autograd = autograd
        self._queue = queue
        self._steps = steps

    def train_step(self, inputs: Any, targets: Any = None, *, lr: float | None = None) -> Future[StepResult]:
        """Several of them are on their way at once: `futures` are as fast as `Model.train_steps`."""
        try:
            return self._queue.submit_step(self._steps.make(inputs, targets, lr, owned=True))
        except Exception as error:
            return _failed(error)

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        validation: Any = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Future[FitResult]:
        """As `Model.fit`, whose tensors must not change before the end. Callbacks are called in another thread."""
        try:
            arguments = FitArguments.checked(
                data,
                epochs=epochs,
                batch_size=batch_size,
                shuffle=shuffle,
                seed=seed,
                validation=validation,
                callbacks=callbacks,
                progress=progress,
            )
            return self._queue.submit(lambda: self._calls.fit(arguments))
        except Exception as error:
            failed: Future[FitResult] = Future()
            failed.set_exception(error)
            return failed

    def forward_backward(self, inputs: Any, targets: Any = None) -> Future[StepResult]:
        return self._submit(lambda: self._calls.forward_backward(inputs, targets))

    def optimizer_step(
        self, gradients: Mapping[str, Any] | None = None, *, lr: float | None = None
    ) -> Future[StepResult]:
        return self._submit(lambda: self._calls.optimizer_step(gradients, lr))

    def zero_grad(self) -> Future[None]:
        return self._submit(self._calls.zero_grad)

    def compute_gradients(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        wrt: str | Sequence[str] | None = None,
        input_gradients: bool = False,
        outputs: bool = False,
        dtype: torch.dtype | str | None = None,
        top_k: float | None = None,
        training: bool = True,
        seed: int | None = None,
    ) -> Future[GradientResult]:
        return self._submit(
            lambda: self._calls.compute_gradients(
                inputs,
                targets,
                wrt=wrt,
                input_gradients=input_gradients,
                outputs=outputs,
                dtype=dtype,
                top_k=top_k,
                training=training,
                seed=seed,
            )
        )

    def per_example_gradients(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        wrt: str | Sequence[str] | None = None,
        dtype: torch.dtype | str | None = None,
        training: bool = True,
        seed: int | None = None,
    ) -> Future[dict[str, torch.Tensor]]:
        return self._submit(
            lambda: self._calls.per_example_gradients(
                inputs, targets, wrt=wrt, dtype=dtype, training=training, seed=seed
            )
        )

    def hvp(
        self, inputs: Any, targets: Any, vectors: Mapping[str, Any], *, training: bool = True, seed: int | None = None
    ) -> Future[dict[str, torch.Tensor]]:
        return self._submit(lambda: self._calls.hvp(inputs, targets, vectors, training=training, seed=seed))

    def forward(self, inputs: Any, training: bool = False) -> Future[Any]:
        return self._submit(lambda: self._calls.forward(inputs, training))

    def state_dict(self) -> Future[dict[str, torch.Tensor]]:
        return self._submit(self._calls.state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, partial: bool = False) -> Future[None]:
        return self._submit(lambda: self._calls.load_state_dict(state_dict, partial))

    def optimizer_state_dict(self) -> Future[dict[str, Any]]:
        return self._submit(self._calls.optimizer_state_dict)

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> Future[None]:
        return self._submit(lambda: self._calls.load_optimizer_state_dict(state_dict))

    def update(
        self,
        *,
        lr: float | None = None,
        optimizer: Optimizer | None = None,
        trainable: Mapping[str, bool] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Future[ModelInfo]:
        return self._submit(lambda: self._calls.update(lr=lr, optimizer=optimizer, trainable=trainable, labels=labels))

    def held_gradients(self, wrt: str | Sequence[str] | None = None) -> Future[dict[str, torch.Tensor]]:
        return self._submit(lambda: self._autograd.held_gradients(names_of(wrt)))

    def save(self, name: str | None = None) -> Future[Checkpoint]:
        return self._submit(lambda: self._calls.save(name))

    def info(self) -> Future[ModelInfo]:
        return self._submit(self._calls.info)

    def delete(self) -> Future[None]:
        return self._submit(self._calls.delete)

    def cancel(self) -> None:
        """Give up the calls that were not sent yet: their futures raise Cancelled."""
        self._queue.cancel()

    def _submit(self, make: Callable[[], Call[R]]) -> Future[R]:
        try:
            call = make()
            call.own_tensors()
            return self._queue.submit(lambda: call.run(self._rpc))
        except Exception as error:
            return _failed(error)


def _failed(error: Exception) -> Future[Any]:
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed
