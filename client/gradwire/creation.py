"""Brings a module to the service: exported, checked, uploaded, ready."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradwire.architecture import Architecture
from gradwire.arguments import as_bool, as_count, as_int, as_number, as_text
from gradwire.errors import InvalidArgument
from gradwire.export import ModuleExporter
from gradwire.exporting.loss_mapping import LOSSES_BY_NAME, as_loss
from gradwire.exporting.weight_export import LossWeight
from gradwire.made_models import as_wait, make_model
from gradwire.model import Model
from gradwire.optim import Optimizer
from gradwire.optim.checks import check_positive
from gradwire.rpc import Rpc, new_request_id
from gradwire.transfer import Uploads
from gradwire.updates import as_labels, as_optimizer
from gradwire.user_values import normalize
from gradwire_proto import codec
from gradwire_proto.autocast import check_precision
from gradwire_proto.names import check_model_id
from gradwire_proto.tensors import from_nested, from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, LossSpec, ModelSpec, OutputLossSpec

if TYPE_CHECKING:
    from torch import nn


def create_model(
    rpc: Rpc,
    module: nn.Module | Architecture,
    *,
    example: Any,
    loss: Any,
    optimizer: Optimizer | None,
    workers: int,
    model_id: str | None,
    seed: int,
    device: str,
    gpus_per_worker: float,
    require_sharding: bool,
    on_nan: str,
    labels: Mapping[str, str] | None,
    clip_grad_norm: float | None,
    clip_grad_value: float | None,
    precision: str,
    loss_reduction: str | None,
    loss_weight: LossWeight | None,
    durability: str | None,
    checkpoint_every: int | None,
    keep_checkpoints: int | None,
    deterministic: bool,
    sync_batch_norm: bool,
    compile: bool,
    wait_for_capacity: float,
) -> Model:
    """See `Client.create_model`."""
    rpc.check_usable()
    optimizer_spec = as_optimizer(optimizer)
    wait = as_wait(wait_for_capacity)
    settings: dict[str, Any] = {
        "workers": as_int(workers, "model.workers"),
        "device": as_text(device, "model.device"),
        "gpus_per_worker": as_number(gpus_per_worker, "model.gpus_per_worker", minimum=0),
        "seed": as_int(seed, "model.seed"),
        "on_nan": as_text(on_nan, "model.on_nan"),
        "require_sharding": as_bool(require_sharding, "model.require_sharding"),
        "labels": {} if labels is None else as_labels(labels, "model.labels"),
        "precision": check_precision(as_text(precision, "model.precision"), "model.precision"),
        "durability": "" if durability is None else as_text(durability, "model.durability"),
        "checkpoint_every": as_count(checkpoint_every, "model.checkpoint_every") or 0,
        "keep_checkpoints": as_count(keep_checkpoints, "model.keep_checkpoints") or 0,
        "deterministic": as_bool(deterministic, "model.deterministic"),
        "sync_batch_norm": as_bool(sync_batch_norm, "model.sync_batch_norm"),
        "compile": as_bool(compile, "model.compile"),
        "loss_reduction": None if loss_reduction is None else as_text(loss_reduction, "model.loss_reduction"),
    }
    for name, bound in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
        if bound is not None:
            check_positive(bound, field=f"model.{name}", words=f"{name} value")
    chosen_id = f"model-{uuid.uuid4().hex[:12]}" if model_id is None else check_model_id(model_id)
    inputs, targets = _inputs_and_targets(example)
    settings |= {"optimizer": optimizer_spec, "clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value}
    if loss_reduction is not None and loss_weight is not None:
        message = "give loss_reduction or loss_weight: both say what rows weigh in the loss"
        raise InvalidArgument(message, field="model.loss_reduction", reason="WEIGHTS_TWICE")
    if isinstance(module, Architecture):
        if loss_weight is not None:
            message = "an architecture is not at hand to export the weight with: give loss_reduction, or neither"
            raise InvalidArgument(message, field="loss_weight", reason="LOSS_NOT_BY_NAME")
        spec = ModelSpec(program=module.spec(), loss=_loss_by_name(loss, targets), **settings)
        batch = Batch(normalize(inputs, "example.inputs"), normalize(targets, "example.targets"))
        # Always with the example: a batch that the module does not take is refused at once.
        return Model(rpc, codec.decode_model_info(_create(rpc, spec, {}, batch, chosen_id, wait)))
    exporter = ModuleExporter(module, loss, settings["precision"], loss_weight)
    exported = exporter.export_model(inputs, targets)
    if exported.loss is None and loss_weight is not None:
        message = "there is no loss for the rows to weigh in: give one, or let the module return it"
        raise InvalidArgument(message, field="loss_weight", reason="NO_LOSS")
    spec = ModelSpec(program=exported.program, loss=exported.loss, **settings)
    # One rank has nothing to split: what the caller says of the loss is all that there is to check.
    is_tried = spec.workers > 1 or loss_reduction is not None or loss_weight is not None
    batch = exported.example if is_tried else None
    reply = _create(rpc, spec, exported.tensors, batch, chosen_id, wait)
    return Model(rpc, codec.decode_model_info(reply), exporter=exporter, exported=exported.variants)


def _inputs_and_targets(example: Any) -> tuple[Any, Any]:
    # A DataLoader yields lists.
    if not isinstance(example, (tuple, list)):
        return example, None
    if len(example) not in (1, 2):
        message = f"expected (inputs, targets) or (inputs,), got a {type(example).__qualname__} of {len(example)}"
        raise InvalidArgument(message, field="example", reason="EXAMPLE_INVALID")
    return (example[0], example[1]) if len(example) == 2 else (example[0], None)


def _loss_by_name(loss: Any, targets: Any) -> LossSpec:
    """The loss of an architecture: one that the service knows by name. None: the module's first output."""
    known = as_loss(loss)
    if known is None:
        return OutputLossSpec(0)
    if known.spec is None:
        raise InvalidArgument(
            "an architecture is not at hand to export the loss with: give a loss of torch.nn that the service knows by"
            f" name ({', '.join(sorted(LOSSES_BY_NAME))}), or None where the model returns it",
            field="loss",
            reason="LOSS_NOT_BY_NAME",
        )
    if targets is None:
        raise InvalidArgument("the loss needs targets: (inputs, targets)", field="example", reason="EXAMPLE_INVALID")
    return known.spec


def _create(
    rpc: Rpc, spec: ModelSpec, values: Mapping[str, Any], example: Batch | None, model_id: str, wait: float
) -> Any:
    """The service's reply."""
    request = pb.CreateModelRequest(model_id=model_id, request_id=new_request_id())
    codec.encode_model_spec(spec, request.model)
    tensors = {name: from_torch(tensor, f'tensors["{name}"]') for name, tensor in values.items()}
    batch = example or Batch(None)
    inputs, targets = from_nested(batch.inputs, "example.inputs"), from_nested(batch.targets, "example.targets")
    uploads = Uploads(rpc)
    tensors, inputs, targets = uploads.send_apart((tensors, inputs, targets))
    codec.encode_named_tensors(tensors, request.tensors)
    if example is not None:
        codec.encode_batch(Batch(inputs, targets), request.example, "example")
    return make_model(rpc, "CreateModel", request, uploads.deadline, uploads.send_again, wait)
