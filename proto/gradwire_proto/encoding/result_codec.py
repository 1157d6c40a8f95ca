"""What commands and reads answer, to messages and back."""

from __future__ import annotations

from google.rpc import code_pb2, status_pb2

from gradwire_proto.encoding.enum_words import COMMAND_STATES
from gradwire_proto.encoding.sparse_codec import decode_sparse_tensors, encode_sparse_tensor
from gradwire_proto.encoding.tensor_codec import decode_named_tensors, decode_value, encode_named_tensors, encode_value
from gradwire_proto.v1 import gradient_service_pb2 as service_pb
from gradwire_proto.v1 import model_pb2 as pb
from gradwire_proto.values import CommandInfo, ForwardResult, GradientResult, StepResult, Timing


def encode_timing(value: Timing, into: pb.Timing | None = None) -> pb.Timing:
    """The message of a timing, in seconds."""
    message = pb.Timing() if into is None else into
    message.queue = value.queue
    message.transfer = value.transfer
    message.compute = value.compute
    message.all_reduce = value.all_reduce
    message.optimizer = value.optimizer
    message.recovery = value.recovery
    message.total = value.total
    return message


def decode_timing(message: pb.Timing) -> Timing:
    """The timing of a message, in seconds."""
    return Timing(
        queue=message.queue,
        transfer=message.transfer,
        compute=message.compute,
        all_reduce=message.all_reduce,
        optimizer=message.optimizer,
        recovery=message.recovery,
        total=message.total,
    )


def encode_step_result(value: StepResult, into: pb.StepResult | None = None) -> pb.StepResult:
    """The message of what a training command answers."""
    message = pb.StepResult() if into is None else into
    if value.loss is not None:
        message.loss = value.loss
    message.step = value.step
    message.num_examples = value.num_examples
    if value.grad_norm is not None:
        message.grad_norm = value.grad_norm
    if value.lr is not None:
        message.learning_rate = value.lr
    encode_timing(value.timing, message.timing)
    message.rank_rows.extend(value.rank_rows)
    message.skipped = value.skipped
    if value.loss_scale is not None:
        message.loss_scale = value.loss_scale
    return message


def decode_step_result(message: pb.StepResult) -> StepResult:
    """What a training command answers."""
    return StepResult(
        loss=message.loss if message.HasField("loss") else None,
        step=message.step,
        num_examples=message.num_examples,
        grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
        lr=message.learning_rate if message.HasField("learning_rate") else None,
        timing=decode_timing(message.timing),
        rank_rows=tuple(message.rank_rows),
        skipped=message.skipped,
        loss_scale=message.loss_scale if message.HasField("loss_scale") else None,
    )


def encode_command_info(value: CommandInfo, into: pb.Command | None = None) -> pb.Command:
    """The message of what became of a command."""
    message = pb.Command() if into is None else into
    message.name = value.name
    message.state = COMMAND_STATES.number(value.state, "state")  # pyright: ignore[reportAttributeAccessIssue]
    if value.error is not None:
        message.error.CopyFrom(status_pb2.Status(code=code_pb2.UNKNOWN, message=value.error))
    return message


def decode_command_info(message: pb.Command, field: str = "command") -> CommandInfo:
    """What became of a command."""
    return CommandInfo(
        name=message.name,
        state=COMMAND_STATES.word(message.state, f"{field}.state"),
        error=message.error.message if message.HasField("error") else None,
    )


def encode_gradient_result(
    value: GradientResult, into: service_pb.ComputeGradientsResponse | None = None
) -> service_pb.ComputeGradientsResponse:
    """The answer of ComputeGradients."""
    message = service_pb.ComputeGradientsResponse() if into is None else into
    message.loss = value.loss
    message.step = value.step
    message.num_examples = value.num_examples
    for name, gradient in value.gradients.items():
        if isinstance(gradient, tuple):
            encode_sparse_tensor(name, gradient, message.sparse_gradients.add())
        else:
            encode_named_tensors({name: gradient}, message.gradients)
    if value.input_gradients is not None:
        encode_value(value.input_gradients, message.input_gradients, "input_gradients")
    if value.outputs is not None:
        encode_value(value.outputs, message.outputs, "outputs")
    encode_timing(value.timing, message.timing)
    message.rank_rows.extend(value.rank_rows)
    return message


def decode_gradient_result(message: service_pb.ComputeGradientsResponse) -> GradientResult:
    """What ComputeGradients answers. Tensors are TensorData, of bytes or of a Handle."""
    has_input_gradients = message.HasField("input_gradients")
    return GradientResult(
        loss=message.loss,
        step=message.step,
        num_examples=message.num_examples,
        gradients=decode_named_tensors(message.gradients, "gradients")
        | decode_sparse_tensors(message.sparse_gradients, "sparse_gradients"),
        input_gradients=decode_value(message.input_gradients, "input_gradients") if has_input_gradients else None,
        outputs=decode_value(message.outputs, "outputs") if message.HasField("outputs") else None,
        timing=decode_timing(message.timing),
        rank_rows=tuple(message.rank_rows),
    )


def encode_forward_result(
    value: ForwardResult, into: service_pb.ForwardResponse | None = None
) -> service_pb.ForwardResponse:
    """The answer of Forward."""
    message = service_pb.ForwardResponse() if into is None else into
    encode_value(value.outputs, message.outputs, "outputs")
    message.step = value.step
    encode_timing(value.timing, message.timing)
    message.rank_rows.extend(value.rank_rows)
    message.retained = value.retained or ""
    message.differentiable_outputs.extend(value.differentiable_outputs)
    return message


def decode_forward_result(message: service_pb.ForwardResponse) -> ForwardResult:
    """What Forward answers. Tensors are TensorData, of bytes or of a Handle."""
    return ForwardResult(
        outputs=decode_value(message.outputs, "outputs"),
        step=message.step,
        timing=decode_timing(message.timing),
        rank_rows=tuple(message.rank_rows),
        retained=message.retained or None,
        differentiable_outputs=tuple(message.differentiable_outputs),
    )
