"""A service that holds the one model that a client creates, in a few lines, and what tests send it."""

from __future__ import annotations

import torch
from torch import nn

from gradwire.variants import without_graph
from gradwire_proto import codec
from gradwire_proto.errors import ModelNotFound
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import ModelInfo, Sharding, StepResult, Timing

FEATURES = 3
RESULT = StepResult(
    loss=0.25, step=4, num_examples=6, lr=0.1, grad_norm=2.0, timing=Timing(total=0.5), rank_rows=(3, 3)
)


class OneModel:
    """Holds the model that a client creates, and answers its calls with fixed results."""

    def __init__(self, scripted) -> None:
        self.info: ModelInfo | None = None
        self.created: pb.CreateModelRequest | None = None
        reply = lambda kind: lambda request, context: kind(result=codec.encode_step_result(RESULT))  # noqa: E731
        scripted.answers |= {
            "CreateModel": self.create,
            "GetModel": self.get,
            "AddVariant": self.add_variant,
            "TrainStep": reply(pb.TrainStepResponse),
            "ForwardBackward": reply(pb.ForwardBackwardResponse),
            "OptimizerStep": reply(pb.OptimizerStepResponse),
            "ZeroGrad": lambda request, context: pb.ZeroGradResponse(),
            "LoadStateDict": lambda request, context: pb.LoadStateDictResponse(),
        }

    def create(self, request, context):
        spec = codec.decode_model_spec(request.model)
        self.created = request
        self.info = ModelInfo(
            id=request.model_id,
            state="ready",
            step=0,
            workers=spec.workers,
            sharding=Sharding("rows", "they are independent"),
            num_parameters=8,
            optimizer=spec.optimizer,
            loss=spec.loss,
            labels=spec.labels,
            created_at=1.5,
            tensors=spec.program.tensors,
            variants=tuple(map(without_graph, spec.program.variants)),
        )
        return codec.encode_model_info(self.info)

    def get(self, request, context):
        if self.info is None or request.name != f"models/{self.info.id}":
            raise ModelNotFound(f"there is no {request.name}", reason="MODEL_NOT_FOUND")
        return codec.encode_model_info(self.info)

    def add_variant(self, request, context):
        assert self.info is not None
        return codec.encode_model_info(self.info)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 2), nn.BatchNorm1d(2))


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, FEATURES), torch.randint(0, 2, (rows,))


def sent(scripted, method: str):
    return scripted.requests(method)[-1]


def empty():
    from google.protobuf.empty_pb2 import Empty

    return Empty()
