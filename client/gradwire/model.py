"""A model on the service: what users hold, train and read."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from gradwire.arguments import as_count, as_iterator, wrong_type
from gradwire.autograd_calls import AutogradCalls
from gradwire.calls import Call, ModelCalls
from gradwire.deadline import Deadline
from gradwire.errors import GradwireError
from gradwire.fit import Callback
from gradwire.fit_arguments import FitArguments
from gradwire.fit_results import FitResult
from gradwire.futures import CallQueue
from gradwire.gradient_queries import names_of
from gradwire.model_futures import ModelFutures
from gradwire.optim import Optimizer
from gradwire.remote_module import RemoteModule
from gradwire.remote_optimizer import RemoteOptimizer
from gradwire.rpc import Rpc
from gradwire.step_futures import StepFutures
from gradwire.step_requests import StepRequests
from gradwire.train_steps import train_steps
from gradwire.variants import Variants, without_graph
from gradwire_proto.values import Batch, Checkpoint, GradientResult, ModelInfo, StepResult

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradwire.export import ExportedVariant, ModuleExporter

R = TypeVar("R")


class Model:
    """A model on the service. Made by `Client.create_model` and `Client.get_model`.

    `inputs` and `targets` are each a tensor, a tuple of tensors (positional arguments of the module) or a dict of them
    (keyword arguments), nested where the module takes it so; NumPy arrays are taken wherever tensors are. Rows are
    dimension 0. Tensors of any device are taken; results are on the CPU. What a call was given is read before the call,
    or its future, returns.

    Calls raise InvalidArgument (with `.field` and the bound) for input that does not fit, FailedPrecondition where the
    model has no loss, optimizer or gradients that the call needs, ModelNotFound once it is deleted, Unavailable where
    the service did not answer within the client's timeout, however often it was asked, DeadlineExceeded where it takes
    longer. A call that is sent again runs once; `.outcome` of an error says whether a command was applied. Threads may
    share a model; the service runs its commands one by one.
    """

    def __init__(
        self,
        rpc: Rpc,
        info: ModelInfo,
        *,
        exporter: ModuleExporter | None = None,
        exported: Sequence[ExportedVariant] = (),
    ) -> None:
        self._rpc = rpc
        self._id = info.id
        self._queue = CallQueue(info.id, StepFutures(rpc))
        variants = Variants(
            map(without_graph, info.variants),
            refresh=lambda deadline: self._calls.info().run(rpc, deadline).variants,
            add=self._add_variant,
            exporter=exporter,
            exported=exported,
            made_there=info.architecture is not None,
        )
        self._calls = ModelCalls(rpc, info, variants)
        self._steps = StepRequests(self._calls)
        self._autograd = AutogradCalls(rpc, info.id, variants, self._calls.changed)
        self._module: RemoteModule | None = None
        self._optimizers: WeakSet[RemoteOptimizer] = WeakSet()
        self._futures = ModelFutures(rpc, self._calls, self._autograd, self._queue, self._steps)

    @property
    def id(self) -> str:
        """The model's id, which `Client.get_model` takes."""
        return self._id

    @property
    def futures(self) -> ModelFutures:
        """The same calls as Futures, without waiting for their results. They run in the order in which they were made.

        Tensors above 4 MiB together are sent before the future is returned.
        """
        return self._futures

    def train_step(self, inputs: Any, targets: Any = None, *, lr: float | None = None) -> StepResult:
        """Forward, backward, all-reduce and update in one; returns loss, step and timing.

        At precision "fp16", a step whose gradients overflow makes no update (`skipped`) and halves the loss scale.

        Gradients that the service holds are neither used nor changed.
        lr: the learning rate of this update, for all parameters; the schedule's, or the optimizer's, where left out. It
        does not touch the schedule, which takes its step all the same.
        """
        self._queue.wait()
        deadline = self._calls.deadline()
        return self._steps.make(inputs, targets, lr, deadline=deadline, owned=False).run(self._rpc, deadline)

    def train_steps(self, batches: Iterable[Any], *, in_flight: int = 8) -> Generator[StepResult]:
        """`train_step` of each batch, and the next are on their way before the results of those before are there.

        Gives the same bits as the steps one by one, in order, many more of them in a second where they are small.
        `batches` yields (inputs, targets), or (inputs,) where the model takes no targets: a DataLoader, for example. It
        is advanced when fewer than `in_flight` steps are unanswered, and never while a result is waited for.

        What a step raises ends the iterator, as does an exception of `batches` itself; the results of all steps before
        come first. Steps behind one that was refused are not applied. Closing the iterator early leaves those that were
        sent applied, and waits for them. So does another call of the model from the loop's body: it runs after them.
        The client's timeout bounds the wait for each result. Ctrl-C while it waits gives up the steps that have not
        been begun, and raises Interrupted, which says how many were applied: what `info().step` tells is so then.
        """
        count = as_count(in_flight, "in_flight")
        if count is None:
            raise wrong_type(in_flight, "in_flight", "an int")
        self._rpc.check_usable()
        iterator = as_iterator(batches, "batches", "an iterable of batches")
        return train_steps(self._rpc, self._steps, self._queue, iterator, count)

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
    ) -> FitResult:
        """Train on a dataset: the loop of `train_step` over its batches, run where the ranks are.

        Every step has the bits that `train_step` gives on the same batch, and outlives what that outlives; one that was
        applied is not applied again, whatever dies on the way. Other calls of the model get their turn in between.

        data: a Dataset, or (inputs, targets), which are uploaded, and gone from the service when this returns.
        epochs: how often to go through all examples. batch_size: rows of a batch, all where left out; the last batch
            of an epoch has those that are left, as a DataLoader's with drop_last=False.
        shuffle: take epoch e's rows in the order of `torch.randperm(n, generator=g)`, with
            `g = torch.Generator().manual_seed(seed + e)`, for any number of workers.
        validation: a Dataset or (inputs, targets), whose mean loss in evaluation mode is computed after each epoch,
            over batches of batch_size rows. Changes nothing. What other calls change meanwhile counts for the rest.
        callbacks: called with a FitStatus after some steps, at most so many as take a tenth of a second, and after each
            validation. One that returns False ends the fit; what one raises does too, and is raised here.
        progress: show how far it is, where stderr is a terminal.

        Ctrl-C ends it, and raises Interrupted, which says how many steps were applied. A step that is refused
        (on_nan="refuse", a class that is not there) ends it with its error, which names epoch and batch; the steps
        before it stay applied.
        """
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
        self._queue.wait()
        return self._calls.fit(arguments)

    def forward_backward(self, inputs: Any, targets: Any = None) -> StepResult:
        """Add the batch's gradients to those that the service holds, as `loss.backward()` does."""
        deadline = self._calls.deadline()
        if self._module is not None:
            self._module.remote_gradients.push(deadline)
        return self._run(self._calls.forward_backward(inputs, targets, deadline))

    def optimizer_step(self, gradients: Mapping[str, Any] | None = None, *, lr: float | None = None) -> StepResult:
        """Apply the gradients that the service holds, or `gradients` ({name: tensor of the parameter's shape}).

        Parameters without a gradient (None, or not named) are left alone, as in torch. `loss` of the result is None.
        Raises InvalidArgument (GRADIENT_NOT_FINITE) where the model refuses numbers that are not finite.
        """
        return self._run(self._calls.optimizer_step(gradients, lr))

    def zero_grad(self) -> None:
        """Drop the gradients that the service holds."""
        if self._module is not None:
            self._module.remote_gradients.drop_local()
        self._run(self._calls.zero_grad())

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
    ) -> GradientResult:
        """Loss and gradients of a batch. Changes nothing on the service, buffers included.

        DROPOUT and other random operators draw anew in every call that is given no `seed`, whatever the model's own
        seed is: steps of compute_gradients and optimizer_step see fresh masks, as those of train_step do. Two calls
        with the same seed, and as many workers, draw the same.

        At precision "fp16" the loss is scaled, and the gradients come unscaled; where they overflow, smaller scales are
        tried.

        wrt: names or globs of parameters; None for all that require gradients, () for none. A tied parameter may be
            named by any of its names.
        input_gradients: gradients of the floating-point inputs too, nested as `inputs`, None where there is none.
        outputs: the module's outputs too.
        dtype: of the gradients returned, such as torch.bfloat16, as `.to(dtype)` rounds the batch's; None for the
            parameters' own. A real one is refused for complex gradients.
        top_k: return of each parameter's gradient only this fraction of its elements, as a sparse tensor (COO): those
            of the largest magnitude, the first ones among equals, one at least. NaN counts as infinite.
        training: whether the module runs in training mode.
        seed: of random operators in this call, a 64-bit int; drawn at random where left out.
        """
        return self._run(
            self._calls.compute_gradients(
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
    ) -> dict[str, torch.Tensor]:
        """Each example's own gradients, by parameter name: tensors [rows, *parameter's shape]. Changes nothing.

        Row i is the gradient of loss(net(x[i : i + 1]), y[i : i + 1]), zeros where the parameter has no part in it.
        So batch norm over a batch's own statistics sees one example at a time, and refuses one that has a single value
        for each channel (InvalidArgument BATCH_TOO_SMALL), as torch does; `training=False` uses the running ones.

        wrt, dtype, training: as for `compute_gradients`. seed: of random operators, which draw anew for each example,
        the same for any number of workers. Raises FailedPrecondition (ROWS_NOT_OPEN) where the module could not be
        exported for one example alone, and ResourceExhausted (GRADIENTS_TOO_LARGE) where the gradients together have
        more bytes than the service's limit `tensor_bytes`.
        """
        return self._run(
            self._calls.per_example_gradients(inputs, targets, wrt=wrt, dtype=dtype, training=training, seed=seed)
        )

    def hvp(
        self, inputs: Any, targets: Any, vectors: Mapping[str, Any], *, training: bool = True, seed: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The Hessian of the batch's loss times `vectors`, by parameter name, exact over ranks. Changes nothing.

        vectors: {name: tensor of the parameter's shape and type}. The Hessian is the one with respect to the parameters
        that are named here, and the products are theirs; the others are fixed. It is the derivative of the gradient, as
        torch.autograd.functional.hvp computes it: backwards twice. training, seed: as for `compute_gradients`.

        Raises InvalidArgument for a vector that fits no parameter; GRADIENT_UNKNOWN where the module calls a
        torch.autograd.Function with a backward of its own, of which the service has no second derivative; and
        PROGRAM_FAILED for an operator of which torch has none.
        """
        return self._run(self._calls.hvp(inputs, targets, vectors, training=training, seed=seed))

    def forward(self, inputs: Any, training: bool = False) -> Any:
        """The module's outputs, without gradients. In training mode buffers move, so that it is a command.

        Random operators draw anew in every call: in training mode as the model's seed and the number of the command
        say, so that a model made and trained alike repeats them.
        """
        return self._run(self._calls.forward(inputs, training))

    def __call__(self, inputs: Any) -> Any:
        """The module's outputs in eval mode, without gradients."""
        return self.forward(inputs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name, in the module's order, with memory of their own."""
        return self._run(self._calls.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], *, partial: bool = False) -> None:
        """Replace parameters and persistent buffers by name. Element types are converted, but not complex into real.

        partial: names that are left out keep their values; otherwise they are an error, as in torch.
        """
        self._run(self._calls.load_state_dict(state_dict, partial))

    def optimizer_state_dict(self) -> dict[str, Any]:
        """The state of the optimizer and its schedule, by parameter name, with memory of its own.

        Four keys: "optimizer" is the class name; "state" has for each parameter that was ever updated what torch.optim
        keeps of it (`{"0.weight": {"step": ..., "exp_avg": ...}}`), LBFGS's one state under the first; "param_groups"
        is a list of dicts, the names "params" and the group's options as they are now, learning rate included;
        "schedule" has the class "name", its counters "state" and its "schedulers", or is None. A tied weight appears
        once. At precision "fp16" there is a fifth, "scaler": what torch.amp.GradScaler.state_dict gives.
        """
        return self._run(self._calls.optimizer_state_dict())

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the state of the optimizer and its schedule, bit for bit: both, or neither.

        state_dict: what `optimizer_state_dict` gave, of a model with the same parameters, optimizer, groups and kinds
        of schedule. Options come from it, as in torch; a schedule's arguments stay the model's own. A parameter left
        out of "state" begins anew. Raises InvalidArgument with the path of what does not fit.
        """
        deadline = self._calls.deadline()
        self._run(self._calls.load_optimizer_state_dict(state_dict, deadline))
        self._have_optimizers_catch_up(deadline, None)

    def update(
        self,
        *,
        lr: float | None = None,
        optimizer: Optimizer | None = None,
        trainable: Mapping[str, bool] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> ModelInfo:
        """Change settings between two updates: all that are named, or on an error none. Returns the model's new info.

        trainable: {name or glob of parameters: whether they are trained}, such as {"encoder.*": False}; a later entry
            goes over an earlier one. What is frozen has no gradient, a held one included, and no update moves or decays
            it; the optimizer keeps its state of it for when it is unfrozen. LBFGS alone begins anew. One that required
            no gradient when the model was made can be unfrozen where the exported graphs give its true gradient.
        optimizer: in place of the model's, its schedule too: both begin anew, as a new torch.optim optimizer does. To
            change an option and keep the state, edit and load `optimizer_state_dict`.
        lr: of all parameter groups, as setting group["lr"] of torch's optimizer. So a schedule goes on as torch's does:
            one that multiplies the rate (StepLR, ExponentialLR, ...) goes on from `lr`; one that computes it
            (OneCycleLR, CyclicLR, CosineAnnealingWarmRestarts) sets its own with its next step.
        labels: in place of all labels.

        Raises InvalidArgument: NO_MATCH with names that are near, PARAMETER_FROZEN for one that cannot be unfrozen,
        NOTHING_TO_TRAIN, those of optimizers; FailedPrecondition (NO_OPTIMIZER) for an `lr` without an optimizer.
        """
        deadline = self._calls.deadline()
        info = self._run(self._calls.update(lr=lr, optimizer=optimizer, trainable=trainable, labels=labels), deadline)
        self._have_optimizers_catch_up(deadline, None if optimizer is not None else () if lr is None else ("lr",))
        return info

    def held_gradients(self, wrt: str | Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The gradients that the service holds, over the whole batches, by name. A parameter without one is left out.

        wrt: names or globs of parameters; None for all that require gradients. Raises InvalidArgument (NO_MATCH).
        """
        return self._run(self._autograd.held_gradients(names_of(wrt)))

    def as_module(self) -> nn.Module:
        """The model as an nn.Module, for a training loop as torch has it; the same one at each call.

        Called, it runs the model on the service and keeps there what a backward needs, within the server's settings
        retained_bytes, retained_forwards and retained_seconds; under torch.no_grad() it keeps nothing. Losses, and
        layers before and after it, run here: `loss.backward()` brings gradients to inputs that require them, and adds
        those of the parameters to the ones that the service holds. `parameters()` are placeholders of the right names,
        shapes and types: reading `.grad`, as clip_grad_norm_ does, fetches it, and what is changed there is what
        `as_optimizer().step()` applies; `requires_grad_(False)` freezes. Values are fetched when they are read, and
        changed by `load_state_dict` alone.

        Its calls raise FailedPrecondition: RETAINED_GONE where a backward comes too late, MODIFIED_IN_PLACE where an
        update came between forward and backward; ResourceExhausted: RETAINED_BYTES, RETAINED_FORWARDS.

        It hears of what this Model changes. Another one of the same id, such as another client's, must only read.
        """
        return self._remote_module()

    def as_optimizer(self) -> torch.optim.Optimizer:
        """The model's optimizer as a torch.optim.Optimizer over the parameters of `as_module()`.

        Options that are changed in `param_groups`, by torch.optim.lr_scheduler too, are those of the next step. Raises
        FailedPrecondition where the model has no optimizer, LBFGS, or a schedule that the service steps.
        """
        made = RemoteOptimizer(self._remote_module(), self._calls, self._autograd, self._run)
        self._optimizers.add(made)
        return made

    def save(self, name: str | None = None) -> Checkpoint:
        """Save the model as it is after the calls before this one: all that `Client.restore_model` goes on from.

        The service goes on training meanwhile; when this returns, the checkpoint is whole and stays until it is
        deleted, whatever becomes of the model. Its files open with plain safetensors, too.

        name: 1 to 63 of [a-z0-9-]; chosen where left out. Raises AlreadyExists (CHECKPOINT_EXISTS);
        ResourceExhausted (STORAGE_FULL), FailedPrecondition (STORAGE_READ_ONLY) or Unavailable (STORAGE_UNREACHABLE)
        where the service cannot keep it; DeadlineExceeded where it takes longer than the client's timeout: at outcome
        "unknown" the service is still at it.
        """
        return self._run(self._calls.save(name))

    def info(self) -> ModelInfo:
        """State, step, sharding and settings, as the service has them now."""
        return self._run(self._calls.info())

    def delete(self) -> None:
        """Delete the model and free its ranks. Commands that wait are refused."""
        self._run(self._calls.delete())

    def __repr__(self) -> str:
        return f"<gradwire.Model {self._id!r} at {self._rpc.target}>"

    def _remote_module(self) -> RemoteModule:
        if self._module is None:
            self._module = RemoteModule(self._calls, self._autograd, self._run)
        return self._module

    def _run(self, call: Call[R], deadline: Deadline | None = None) -> R:
        self._queue.wait()
        return call.run(self._rpc, deadline)

    def _have_optimizers_catch_up(self, deadline: Deadline, names: Collection[str] | None) -> None:
        for each in self._optimizers:
            # The call is applied; whatever keeps it from hearing of that now, it asks again before its next step.
            with suppress(GradwireError):
                each.catch_up(deadline, names)

    def _add_variant(self, exported: ExportedVariant, batch: Batch, deadline: Deadline) -> None:
        self._calls.add_variant(exported, batch, deadline).run(self._rpc)
