"""A model of one parameter, x * w, as a request has it, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradwire_proto.values import (
    Graph,
    GraphInput,
    LeafRef,
    ModelSpec,
    Node,
    NodeRef,
    OptimizerSpec,
    Program,
    Segment,
    SplitDecision,
    StateTensor,
    Symbol,
    TensorData,
    TensorSpec,
    Variant,
)

MUL = "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor"


def two_floats(value: bytes = b"\0\0\x80\x3f\0\0\0\x40") -> TensorData:
    """A row of two floats."""
    return TensorData("float32", (1, 2), value)


def read(tensor: TensorData) -> bytes:
    """A tensor's bytes, wherever they are."""
    if isinstance(tensor.data, Segment):
        content = Path(tensor.data.path).read_bytes()
        return content[tensor.data.offset : tensor.data.offset + tensor.data.nbytes]
    return bytes(tensor.data)


def variant(name: str = "train") -> Variant:
    """x * w."""
    graph = Graph(
        inputs=("w", "x"),
        nodes=(Node("y", "aten.mul.Tensor", (NodeRef("x"), NodeRef("w"))),),
        outputs=(NodeRef("y"),),
    )
    return Variant(
        name=name,
        training=True,
        graph=graph,
        graph_inputs=(GraphInput("tensor", "w"), GraphInput("input", 0)),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec("float32", ("rows", 2)),),
        output_structure=LeafRef(0),
        symbols=(Symbol("rows"),),
    )


WEIGHT = StateTensor(name="w", role="parameter", dtype="float32", shape=(1, 2), requires_grad=True)


def model_spec(**changes: Any) -> ModelSpec:
    """A model of one parameter."""
    program = Program(
        torch_version="2.13.0",
        tensors=(WEIGHT,),
        variants=(variant(),),
        operators={"aten.mul.Tensor": MUL},
    )
    return ModelSpec(**{"program": program, "optimizer": OptimizerSpec("SGD", {"lr": 0.1})} | changes)


def whole(reason: str | None) -> SplitDecision:
    """Why batches are not split; None: they are."""
    return SplitDecision(whole=reason, inputs_whole=False, returns_loss=False, loss=None, weight=None)
