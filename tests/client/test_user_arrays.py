"""NumPy arrays of every layout are taken as the tensors that they hold, wherever tensors are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradwire import errors
from gradwire.client import Client
from gradwire.user_values import normalize
from gradwire_proto import codec
from gradwire_proto.tensors import to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import GradientResult, StepResult

PLAIN = np.arange(12, dtype=np.float32).reshape(4, 3)
LAYOUTS = {
    "in Fortran's order": lambda: np.asfortranarray(PLAIN),
    "transposed": lambda: np.ascontiguousarray(PLAIN.T).T,
    "of reversed rows": lambda: np.ascontiguousarray(PLAIN[::-1])[::-1],
    "of every other column": lambda: np.repeat(PLAIN, 2, axis=1)[:, ::2],
    "big-endian": lambda: PLAIN.astype(">f4"),
    "big-endian, in Fortran's order": lambda: np.asfortranarray(PLAIN.astype(">f4")),
    "a field of records": lambda: _records()["value"],
    "read-only": lambda: _read_only(PLAIN.copy()),
    "of a view that repeats": lambda: np.broadcast_to(PLAIN, (2, 4, 3))[1],
}


def _records() -> np.ndarray:
    records = np.zeros(PLAIN.shape, dtype=np.dtype([("flag", "u1"), ("value", "f4")]))
    records["value"] = PLAIN
    return records


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.fixture(params=LAYOUTS)
def array(request) -> np.ndarray:
    return LAYOUTS[request.param]()


def test_array_arrives_in_a_step_a_state_and_gradients(array, held_model, scripted):
    result = codec.encode_step_result(StepResult(loss=0.5, step=1, num_examples=4))
    scripted.answers |= {
        "TrainStep": lambda request, context: pb.TrainStepResponse(result=result),
        "OptimizerStep": lambda request, context: pb.OptimizerStepResponse(result=result),
        "LoadStateDict": lambda request, context: pb.LoadStateDictResponse(),
    }
    model = held_model(nn.Linear(3, 4), nn.MSELoss(), (torch.zeros(4, 3), torch.zeros(4, 4)))
    model.train_step(array, torch.zeros(4, 4))
    model.load_state_dict({"weight": array}, partial=True)
    model.optimizer_step({"weight": array})
    sent = (
        codec.decode_batch(scripted.requests("TrainStep")[0].batch).inputs,
        codec.decode_named_tensors(scripted.requests("LoadStateDict")[0].tensors)["weight"],
        codec.decode_named_tensors(scripted.requests("OptimizerStep")[0].gradients)["weight"],
    )
    for tensor in sent:
        assert torch.equal(to_torch(tensor), torch.from_numpy(PLAIN))


def test_array_is_an_argument_of_a_function(array, rpc, scripted):
    seen = []

    def answer(request, context):
        seen.append(codec.decode_batch(request.batch).inputs[0])
        return codec.encode_gradient_result(
            GradientResult(
                loss=0.0, step=0, num_examples=0, gradients={}, input_gradients=(seen[-1],), outputs=(seen[-1],)
            )
        )

    scripted.answers["ComputeGradients"] = answer
    gradient = Client(rpc).grad(lambda x: (x * x).sum())(array)
    assert torch.equal(to_torch(seen[0]), torch.from_numpy(PLAIN))
    assert torch.equal(gradient, torch.from_numpy(PLAIN))


def test_array_in_an_example_is_exported(array, held_model):
    held_model(nn.Linear(3, 4), nn.MSELoss(), (array, np.zeros((4, 4), dtype=np.float32)))


@pytest.mark.parametrize("shape", [(1,), (1, 3), (0, 3), ()])
def test_array_of_one_row_or_none_is_taken_whatever_its_strides(shape):
    plain = np.ones(shape)
    records = np.ones(shape, dtype=[("value", "f8"), ("pad", "u4")])["value"]
    for array in (plain[::-1] if shape else plain, records):
        assert torch.equal(normalize(array), torch.ones(shape, dtype=torch.float64))


def test_plain_array_is_not_copied():
    array = PLAIN.copy()
    tensor = normalize(array)
    array[0, 0] = 7.0
    assert tensor[0, 0] == 7.0


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "u4", "V0"])
def test_array_of_a_type_that_the_service_lacks_is_refused_by_name(dtype):
    with pytest.raises(errors.InvalidArgument) as caught:
        normalize({"x": np.zeros(2, dtype=dtype)}, "batch.inputs")
    assert (caught.value.reason, caught.value.field) == ("DTYPE_UNSUPPORTED", "batch.inputs.x")


def test_array_that_begins_where_torch_cannot_load_is_copied():
    array = np.frombuffer(bytearray(16 * 5 + 8), np.uint8)[8:].view(np.complex128)
    array[:] = np.arange(5)
    tensor = normalize(array, "args")
    assert tensor.data_ptr() % 16 == 0 and tensor.tolist() == array.tolist()
