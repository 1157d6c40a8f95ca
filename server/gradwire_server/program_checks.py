"""What is checked of programs before any rank sees them. Nothing here needs torch, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gradwire_proto.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted
from gradwire_proto.graph_check import check_program, check_tensors, check_variant
from gradwire_proto.values import (
    ArchitectureSpec,
    FunctionSpec,
    GraphLossSpec,
    Handle,
    Limits,
    LossSpec,
    ModelInfo,
    ModelSpec,
    NamedTensors,
    OptimizerSpec,
    StateTensor,
    TensorData,
    TorchLossSpec,
    Variant,
    leaves,
)


def check_model(spec: ModelSpec, values: NamedTensors, limits: Limits) -> None:
    """Check what CreateModel brings."""
    if isinstance(spec.program, ArchitectureSpec):
        _check_architecture(spec, values)
    else:
        check_program(spec.program, limits=limits, field="model.program.graphs")
        check_values(spec.program.tensors, values, "tensors")
        for index, variant in enumerate(spec.program.variants):
            _check_weights(variant, spec.loss, spec.loss_reduction, f"model.program.graphs.variants[{index}]")
    _check_options(spec.loss, "model.loss.torch.options")
    _check_options(spec.optimizer, "model.optimizer.options")
    _check_compile(spec)
    if spec.loss_reduction is not None and spec.loss is None:
        raise InvalidArgument("there is no loss to reduce", field="model.loss_reduction", reason="NO_LOSS")


def _check_compile(spec: ModelSpec) -> None:
    """Refuse to compile what never can be."""
    if not spec.compile:
        return
    if isinstance(spec.program, ArchitectureSpec):
        message = "architectures are not compiled: bring the module's graphs, or leave it out"
        raise InvalidArgument(message, field="model.compile", reason="COMPILE_UNFIT")
    if spec.loss is None:
        message = "what is compiled is the way from a batch to its loss and back, and the model has no loss"
        raise InvalidArgument(message, field="model.compile", reason="NO_LOSS")


def _check_architecture(spec: ModelSpec, values: NamedTensors) -> None:
    """Its config is for the ranks, which know its class."""
    check_values((), values, "tensors")
    if isinstance(spec.loss, GraphLossSpec):
        raise InvalidArgument(
            "an architecture has no graphs: give a loss of torch.nn.functional by name, or an output that is the loss",
            field="model.loss.graph",
            reason="LOSS_DOES_NOT_FIT",
        )
    if spec.loss_reduction is not None:
        message = "the losses that an architecture can have are known: leave it out"
        raise InvalidArgument(message, field="model.loss_reduction", reason="LOSS_DOES_NOT_FIT")


def check_function(function: FunctionSpec, limits: Limits) -> None:
    """Check a function, if it comes with its program."""
    if function.program is not None:
        check_program(function.program, limits=limits, field="function.program.graphs")
        check_values(function.program.tensors, function.tensors, "function.tensors")


def check_new_variant(
    model: ModelInfo,
    known_operators: Mapping[str, str],
    variant: Variant,
    tensors: tuple[StateTensor, ...],
    operators: Mapping[str, str],
    values: NamedTensors,
    limits: Limits,
) -> None:
    """Check what AddVariant brings to `model`, whose program names `known_operators` already."""
    check_variant_fits(model, variant, limits)
    for index, tensor in enumerate(tensors):
        if tensor.role != "constant" or tensor.alias_of is not None:
            raise InvalidArgument(
                "a variant brings constants of its own only", field=f"tensors[{index}]", reason="TENSOR_NOT_CONSTANT"
            )
    together = (*model.tensors, *tensors)
    check_tensors(together, limits=limits, field="tensors")
    check_values(tensors, values, "values")
    check_variant(variant, together, {**known_operators, **operators}, limits=limits, field="variant")
    _check_weights(variant, model.loss, model.loss_reduction, "variant")


def check_variant_fits(model: ModelInfo, variant: Variant, limits: Limits) -> None:
    """Check that `model` takes variants, has room for one more, and none of that name."""
    if model.architecture is not None:
        raise FailedPrecondition(
            f"{model.architecture} is an architecture, which takes batches of every shape without them",
            field="variant",
            reason="VARIANT_NOT_TAKEN",
        )
    if len(model.variants) >= limits.variants:
        raise ResourceExhausted(
            f"the model has {len(model.variants)} variants, as many as the server's setting variants allows",
            field="variant",
            reason="TOO_MANY_VARIANTS",
        )
    if any(variant.name == other.name for other in model.variants):
        raise AlreadyExists(
            f"the model has a variant {variant.name[:80]!r} already", field="variant.name", reason="VARIANT_EXISTS"
        )


def check_values(tensors: Iterable[StateTensor], values: NamedTensors, field: str) -> None:
    """Check that `values` are those of `tensors` that are no aliases: each there, of its type, and no others."""
    own = {tensor.name: tensor for tensor in tensors if tensor.alias_of is None}
    for name, tensor in own.items():
        value = values.get(name)
        path = f'{field}["{name}"]'
        if value is None:
            raise InvalidArgument(
                "the program names this tensor, but no value came", field=path, reason="VALUE_MISSING"
            )
        if (value.dtype, tuple(value.shape)) != (tensor.dtype, tuple(tensor.shape)):
            raise InvalidArgument(
                f"expected {tensor.dtype}{list(tensor.shape)}, got {value.dtype}{list(value.shape)}",
                field=path,
                reason="VALUE_TYPE_MISMATCH",
            )
    for name in values:
        if name not in own:
            path = f'{field}["{name}"]'
            raise InvalidArgument("the program has no such tensor of its own", field=path, reason="VALUE_UNKNOWN")


def _check_weights(variant: Variant, loss: LossSpec | None, reduction: str | None, field: str) -> None:
    """Check that somebody would look at the variant's weight graph, if it has one."""
    if variant.weight_graph is None:
        return
    if loss is None:
        message, reason = "there is no loss for the rows to weigh in", "NO_LOSS"
    elif reduction is not None:
        message, reason = f"rows cannot weigh in a {reduction} of rows as well: give one of them", "WEIGHTS_TWICE"
    else:
        return
    raise InvalidArgument(message, field=f"{field}.weight_graph", reason=reason)


def _check_options(spec: LossSpec | OptimizerSpec | None, field: str) -> None:
    options: Mapping[str, Any] = spec.options if isinstance(spec, (TorchLossSpec, OptimizerSpec)) else {}
    for path, leaf in leaves(dict(options), field):
        if isinstance(leaf, TensorData) and isinstance(leaf.data, Handle):
            raise InvalidArgument(
                "tensors of options come inline, not by handle", field=path, reason="HANDLE_NOT_ALLOWED"
            )
