"""The calls of one model, each in two halves: the request, made at once, and what to do with the reply.

Making a call reads every tensor that the user gave: afterwards they may change. It also brings to the service what the
request needs there first: big tensors, or another variant. Both the blocking call and the future run the same Call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

from gradwire.arguments import as_bool, as_mapping
from gradwire.checkpoints import creation_request
from gradwire.deadline import Deadline
from gradwire.errors import InvalidArgument
from gradwire.fit_arguments import FitArguments
from gradwire.fit_results import FitResult
from gradwire.forward_requests import forward_request
from gradwire.gradient_queries import check_keeps_imaginary_parts, dense_or_sparse, gradient_query
from gradwire.optim.checks import check_not_negative
from gradwire.rpc import Rpc, new_request_id
from gradwire.transfer import Uploads, inline_bytes, receive
from gradwire.updates import model_update
from gradwire.user_values import normalize
from gradwire.variants import Variants
from gradwire_proto import codec
from gradwire_proto.names import command_name, model_name
from gradwire_proto.step_template import StepTemplate
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import (
    Batch,
    Checkpoint,
    GradientQuery,
    GradientResult,
    ModelInfo,
    NamedTensors,
    StepResult,
    Variant,
)

if TYPE_CHECKING:
    import torch

    from gradwire.export import ExportedVariant

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One request to `method`. `command`: its name where it changes the model. `finish`: reply -> result.

    `uploads`: the tensors that went ahead of it. `deletes`: whether finding nothing, when it is sent again, is success.
    """

    method: str
    request: Any
    finish: Callable[[Any], R]
    command: str | None = None
    uploads: Uploads | None = None
    deletes: bool = False

    def run(self, rpc: Rpc, deadline: Deadline | None = None) -> R:
        """Send the request, again where that helps, and return the result.

        deadline: that of the call of which this is a part; None: that of the uploads, or a new one.
        """
        if deadline is None and self.uploads is not None:
            deadline = self.uploads.deadline
        return rpc.call(
            self.method,
            self.request,
            deadline=deadline,
            command=self.command,
            finish=self.finish,
            send_again=self.uploads.send_again if self.uploads else None,
            deletes=self.deletes,
        )

    def own_tensors(self) -> None:
        """Keep copies of the tensors that went ahead: after this, what the user gave may change."""
        if self.uploads is not None:
            self.uploads.own_tensors()


class ModelCalls:
    """Makes the calls of the model that `info` describes, as it was when it was found.

    What no call could be given raises InvalidArgument, whose `field` names it, before anything is sent. deadline: that
    of the call of the SDK of which the call made here is a part; None where it is all of it.
    """

    def __init__(self, rpc: Rpc, info: ModelInfo, variants: Variants) -> None:
        self._rpc = rpc
        self._id = info.id
        self._name = model_name(info.id)
        self._variants = variants
        self.tensors, self.optimizer = info.tensors, info.optimizer
        """As the last reply told them."""
        self._tied = {tensor.name: tensor.alias_of for tensor in info.tensors if tensor.alias_of}
        self._loss = info.loss
        self._refuses_nan = info.on_nan == "refuse"
        self.changes = 0
        """Commands that were made: what was read before is not what the service has now."""
        self.gradient_changes = 0
        """Those that change the gradients that the service holds."""
        self.settings_changes = 0
        """Those that change what is trained, or options of the optimizer."""
        self.watchers: WeakSet[Any] = WeakSet()
        """Their `take_settings()` is called when `tensors` has changed."""

    def deadline(self) -> Deadline:
        """That of a call of the SDK which begins now and is several of these calls."""
        return Deadline(self._rpc.timeout)

    def train_step(
        self,
        inputs: Any,
        targets: Any,
        lr: float | None,
        before_variant: Callable[[], None] = lambda: None,
        deadline: Deadline | None = None,
    ) -> Call[StepResult]:
        """before_variant: called before another variant is brought to the service for the batch. deadline: by which all
        ends that is brought there ahead of the step; None: a new one.
        """
        request = pb.TrainStepRequest(name=self._name)
        _set_learning_rate(request, lr)
        uploads = Uploads(self._rpc, deadline)
        given, batch = self._read(inputs, targets)
        if not self._variants.have(batch, training=True, targets=True):
            before_variant()
        self._set_batch(request, uploads, given, batch, training=True)
        return self._command("TrainStep", request, _step_result, uploads)

    def train_step_like(self, template: StepTemplate, data: Sequence[Any]) -> tuple[Call[StepResult], bytes]:
        """A step like the one that the template was made of, with these tensors' bytes: the call, and its request."""
        self._rpc.check_usable()
        self.changed()
        request_id = new_request_id()
        command = command_name(self._id, request_id)
        return Call("TrainStep", None, _step_result, command), template.fill(data, request_id)

    def fit(self, arguments: FitArguments) -> FitResult:
        """Train on a dataset, to the end. Not in two halves: it is many requests."""
        self._rpc.check_usable()
        self.changed()
        try:
            return arguments.run(self._rpc, self._id, self._variants, self._loss)
        finally:
            # What was read meanwhile may be of any step.
            self.changed()

    def forward_backward(self, inputs: Any, targets: Any, deadline: Deadline | None = None) -> Call[StepResult]:
        request = pb.ForwardBackwardRequest(name=self._name)
        uploads = Uploads(self._rpc, deadline)
        self._set_batch(request, uploads, *self._read(inputs, targets), training=True)
        self.gradient_changes += 1
        return self._command("ForwardBackward", request, _step_result, uploads)

    def optimizer_step(self, gradients: Mapping[str, Any] | None, lr: float | None) -> Call[StepResult]:
        request, uploads = pb.OptimizerStepRequest(name=self._name), Uploads(self._rpc)
        _set_learning_rate(request, lr)
        if gradients is not None:
            given = as_mapping(gradients, "gradients")
            values = _tensors({name: each for name, each in given.items() if each is not None}, "gradients")
            if not values:
                message = "expected at least one gradient; leave them out to apply those that the service holds"
                raise InvalidArgument(message, field="gradients", reason="GRADIENTS_EMPTY")
            if self._refuses_nan:
                _check_finite(values)
            codec.encode_named_tensors(uploads.send_apart((values,))[0], request.gradients)
        return self._command("OptimizerStep", request, _step_result, uploads)

    def zero_grad(self) -> Call[None]:
        self.gradient_changes += 1
        return self._command("ZeroGrad", pb.ZeroGradRequest(name=self._name), _nothing)

    def compute_gradients(
        self,
        inputs: Any,
        targets: Any,
        *,
        wrt: str | Sequence[str] | None,
        input_gradients: bool,
        outputs: bool,
        dtype: torch.dtype | str | None,
        top_k: float | None,
        training: bool,
        seed: int | None,
    ) -> Call[GradientResult]:
        query = gradient_query(
            wrt=wrt,
            input_gradients=input_gradients,
            outputs=outputs,
            dtype=dtype,
            top_k=top_k,
            training=training,
            seed=seed,
        )
        uploads = Uploads(self._rpc, for_read=True)
        request, variant = self._gradient_request(query, uploads, inputs, targets)

        def finish(reply: pb.ComputeGradientsResponse) -> GradientResult:
            result = codec.decode_gradient_result(reply)
            parts = receive(self._rpc, (result.gradients, result.input_gradients, result.outputs))
            gradients = {name: dense_or_sparse(each) for name, each in parts[0].items()}
            rebuilt = self._variants.rebuild(variant, parts[2]) if outputs else None
            return replace(result, gradients=gradients, input_gradients=parts[1], outputs=rebuilt)

        return Call("ComputeGradients", request, finish, uploads=uploads)

    def per_example_gradients(
        self,
        inputs: Any,
        targets: Any,
        *,
        wrt: str | Sequence[str] | None,
        dtype: torch.dtype | str | None,
        training: bool,
        seed: int | None,
    ) -> Call[dict[str, torch.Tensor]]:
        query = gradient_query(
            wrt=wrt, input_gradients=False, outputs=False, dtype=dtype, training=training, seed=seed, per_example=True
        )
        uploads = Uploads(self._rpc, for_read=True)
        request, _ = self._gradient_request(query, uploads, inputs, targets)
        return Call("ComputeGradients", request, self._gradients_alone, uploads=uploads)

    def hvp(
        self, inputs: Any, targets: Any, vectors: Mapping[str, Any], *, training: bool, seed: int | None
    ) -> Call[dict[str, torch.Tensor]]:
        values = _tensors(as_mapping(vectors, "vectors"), "vectors")
        if not values:
            message = "expected a vector for at least one parameter"
            raise InvalidArgument(message, field="vectors", reason="VECTORS_MISMATCH")
        query = gradient_query(wrt=None, input_gradients=False, outputs=False, dtype=None, training=training, seed=seed)
        uploads = Uploads(self._rpc, for_read=True)
        request, _ = self._gradient_request(query, uploads, inputs, targets)
        codec.encode_named_tensors(uploads.send_apart((values,))[0], request.vectors)
        return Call("ComputeGradients", request, self._gradients_alone, uploads=uploads)

    def _gradient_request(
        self, query: GradientQuery, uploads: Uploads, inputs: Any, targets: Any
    ) -> tuple[pb.ComputeGradientsRequest, Variant | None]:
        request = pb.ComputeGradientsRequest(name=self._name, max_inline_bytes=inline_bytes(self._rpc))
        codec.encode_gradient_query(query, request)
        given, batch = self._read(inputs, targets)
        check_keeps_imaginary_parts(query, self.tensors, batch.inputs)
        return request, self._set_batch(request, uploads, given, batch, training=query.training)

    def _gradients_alone(self, reply: pb.ComputeGradientsResponse) -> dict[str, torch.Tensor]:
        return receive(self._rpc, (dict(codec.decode_gradient_result(reply).gradients),))[0]

    def forward(self, inputs: Any, training: bool) -> Call[Any]:
        training = as_bool(training, "training")
        request, uploads, variant = forward_request(
            self._rpc, self._name, self._variants, inputs, training=training, is_read=not training
        )

        def finish(reply: pb.ForwardResponse) -> Any:
            return self._variants.rebuild(variant, receive(self._rpc, (codec.decode_forward_result(reply).outputs,))[0])

        if training:
            return self._command("Forward", request, finish, uploads)
        return Call("Forward", request, finish, uploads=uploads)

    def state_dict(self) -> Call[dict[str, torch.Tensor]]:
        request = pb.GetStateDictRequest(name=self._name, max_inline_bytes=inline_bytes(self._rpc))

        def finish(reply: pb.GetStateDictResponse) -> dict[str, torch.Tensor]:
            tensors = receive(self._rpc, (codec.decode_named_tensors(reply.tensors),))[0]
            # As in torch, a tied weight is one tensor under two names.
            return {name: tensors.get(self._tied.get(name, name), tensor) for name, tensor in tensors.items()}

        return Call("GetStateDict", request, finish)

    def load_state_dict(self, tensors: Mapping[str, Any], partial: bool) -> Call[None]:
        request = pb.LoadStateDictRequest(name=self._name, partial=as_bool(partial, "partial"))
        uploads = Uploads(self._rpc)
        values = _tensors(as_mapping(tensors, "state_dict"), "tensors")
        codec.encode_named_tensors(uploads.send_apart((values,))[0], request.tensors)
        return self._command("LoadStateDict", request, _nothing, uploads)

    def optimizer_state_dict(self) -> Call[dict[str, Any]]:
        request = pb.GetOptimizerStateRequest(name=self._name, max_inline_bytes=inline_bytes(self._rpc))

        def finish(reply: pb.GetOptimizerStateResponse) -> dict[str, Any]:
            return receive(self._rpc, (codec.decode_optimizer_state(reply),))[0]

        return Call("GetOptimizerState", request, finish)

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any], deadline: Deadline | None = None) -> Call[None]:
        request, uploads = pb.LoadOptimizerStateRequest(name=self._name), Uploads(self._rpc, deadline)
        codec.encode_value(uploads.send_apart((from_nested(state_dict, "state"),))[0], request.state, "state")
        self.settings_changes += 1
        return self._command("LoadOptimizerState", request, _nothing, uploads)

    def update(
        self,
        *,
        lr: float | None,
        optimizer: Any,
        trainable: Mapping[str, bool] | None,
        labels: Mapping[str, str] | None,
    ) -> Call[ModelInfo]:
        update = model_update(lr=lr, optimizer=optimizer, trainable=trainable, labels=labels)
        request = codec.encode_model_update(update, pb.UpdateModelRequest(name=self._name))

        def finish(reply: Any) -> ModelInfo:
            info = codec.decode_model_info(reply)
            self.tensors, self.optimizer = info.tensors, info.optimizer
            for each in self.watchers:
                each.take_settings()
            return info

        self.settings_changes += update.concerns_ranks
        return self._command("UpdateModel", request, finish)

    def add_variant(self, exported: ExportedVariant, batch: Batch, deadline: Deadline) -> Call[ModelInfo]:
        request = pb.AddVariantRequest(name=self._name)
        codec.encode_variant(exported.variant, request.variant)
        codec.encode_operators(exported.operators, request.operators)
        for tensor in exported.tensors:
            codec.encode_state_tensor(tensor, request.tensors.add())
        values: NamedTensors = {name: from_any(tensor) for name, tensor in exported.values.items()}
        uploads = Uploads(self._rpc, deadline)
        values, inputs, targets = uploads.send_apart((values, batch.inputs, batch.targets))
        codec.encode_named_tensors(values, request.values)
        codec.encode_batch(Batch(inputs, targets), request.example, "example")
        return self._command("AddVariant", request, codec.decode_model_info, uploads)

    def save(self, name: str | None) -> Call[Checkpoint]:
        request = creation_request(self._name, name)
        # Not a change of the model: what was read of it stays true.
        return Call("CreateCheckpoint", request, codec.decode_checkpoint, command_name(self._id, request.request_id))

    def info(self) -> Call[ModelInfo]:
        return Call("GetModel", pb.GetModelRequest(name=self._name), codec.decode_model_info)

    def delete(self) -> Call[None]:
        request = pb.DeleteModelRequest(name=self._name, request_id=new_request_id())
        return Call("DeleteModel", request, _nothing, deletes=True)

    def changed(self) -> None:
        """Note that a call was made that changes the model."""
        self.changes += 1

    def _command(
        self, method: str, request: Any, finish: Callable[[Any], R], uploads: Uploads | None = None
    ) -> Call[R]:
        self.changed()
        request.request_id = new_request_id()
        return Call(method, request, finish, command_name(self._id, request.request_id), uploads)

    def _read(self, inputs: Any, targets: Any) -> tuple[Batch, Batch]:
        """The batch with torch's tensors, and as the contract has it."""
        # First: exporting takes locks, which a forked child may have inherited as held.
        self._rpc.check_usable()
        given = Batch(normalize(inputs, "batch.inputs"), normalize(targets, "batch.targets"))
        return given, Batch(from_nested(given.inputs, "batch.inputs"), from_nested(given.targets, "batch.targets"))

    def _set_batch(
        self, request: Any, uploads: Uploads, given: Batch, batch: Batch, *, training: bool
    ) -> Variant | None:
        variant = self._variants.choose(batch, given, uploads.deadline, training=training, targets=True)
        codec.encode_batch(Batch(*uploads.send_apart((batch.inputs, batch.targets))), request.batch)
        return variant


def _tensors(given: Mapping[str, Any], path: str) -> NamedTensors:
    return {name: from_any(tensor, f'{path}["{name}"]') for name, tensor in given.items()}


def _check_finite(gradients: NamedTensors) -> None:
    for name, gradient in gradients.items():
        if not to_torch(gradient).isfinite().all():
            message = "holds infinities or numbers that are none, which this model refuses"
            raise InvalidArgument(message, field=f'gradients["{name}"]', reason="GRADIENT_NOT_FINITE")


def _set_learning_rate(request: Any, lr: float | None) -> None:
    if lr is not None:
        check_not_negative(lr, field="lr", words="learning rate")
        request.learning_rate = float(lr)


def _step_result(reply: Any) -> StepResult:
    return codec.decode_step_result(reply.result)


def _nothing(reply: Any) -> None:
    return None
