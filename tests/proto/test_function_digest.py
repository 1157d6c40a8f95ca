"""A digest tells functions apart, and is the same wherever it is computed."""

from __future__ import annotations

import itertools
from dataclasses import replace

from gradwire_proto.function_digest import function_digest
from gradwire_proto.values import Program, StateTensor, TensorData

PROGRAM = Program(
    torch_version="2.13.0",
    tensors=(StateTensor(name="constant.0", dtype="float32", shape=(2,), role="constant"),),
    variants=(),
    operators={"aten.mul.Tensor": "mul", "aten.add.Tensor": "add"},
)
BYTES = bytes(range(8))
TENSORS = {"a": TensorData("float32", (2,), BYTES), "b": TensorData("bool", (), b"\x01")}


def test_everything_that_a_result_depends_on_counts():
    digests = [
        function_digest(PROGRAM, TENSORS),
        function_digest(PROGRAM, TENSORS, 1),
        function_digest(replace(PROGRAM, operators={}), TENSORS),
        function_digest(PROGRAM, {}),
        function_digest(PROGRAM, {**TENSORS, "a": TensorData("float32", (2, 1), BYTES)}),
        function_digest(PROGRAM, {**TENSORS, "a": TensorData("int32", (2,), BYTES)}),
        function_digest(PROGRAM, {**TENSORS, "a": TensorData("float32", (2,), BYTES[::-1])}),
        function_digest(PROGRAM, {"c": TENSORS["a"], "b": TENSORS["b"]}),
        function_digest(PROGRAM, {"a": TENSORS["b"], "b": TENSORS["a"]}),
    ]
    assert all(one != other for one, other in itertools.combinations(digests, 2))
    assert all(len(digest) == 64 for digest in digests)


def test_neither_the_order_of_names_nor_pieces_count():
    digest = function_digest(PROGRAM, TENSORS)
    assert function_digest(PROGRAM, dict(reversed(TENSORS.items()))) == digest
    in_pieces = function_digest(PROGRAM, TENSORS, pieces=lambda data: (data[:3], data[3:]))
    assert in_pieces == digest
