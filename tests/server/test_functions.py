"""Functions are differentiated without a model, one by one, and cut when their callers leave."""

from __future__ import annotations

import asyncio
from typing import Any

from gradwire_proto import codec
from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2
from gradwire_proto.values import Batch, Program


async def test_functions_need_no_model(frontend: Any, fakes: Any) -> None:
    program = fakes.model_spec().program
    constant = Program(
        torch_version=program.torch_version,
        tensors=tuple(
            type(tensor)(name="w", role="constant", dtype="float32", shape=(1, 2)) for tensor in program.tensors
        ),
        variants=program.variants,
        operators=program.operators,
    )
    request = pb.ComputeGradientsRequest(input_gradients=True, no_parameter_gradients=True)
    request.function.digest = "0" * 64
    codec.encode_program(constant, request.function.program)
    codec.encode_named_tensors({"w": fakes.two_floats()}, request.function.tensors)
    codec.encode_batch(Batch((fakes.two_floats(),)), request.batch)
    reply = codec.decode_gradient_result(await frontend.stub.ComputeGradients(request))
    assert reply.loss == 2.0 and reply.input_gradients == (fakes.two_floats(),)
    assert frontend.cluster.functions[0].program == constant

    frontend.cluster.error = RankLost("the rank of functions died")
    assert type(await frontend.error(frontend.stub.ComputeGradients(request))) is RankLost
    frontend.cluster.error = None
    request.function.program.graphs.variants[0].graph.nodes[0].operator = "aten.from_file.default"
    error = await frontend.error(frontend.stub.ComputeGradients(request))
    assert error.field == "function.program.graphs.variants[0].graph.nodes[0].operator"


async def test_other_derivatives_of_functions_need_no_model(frontend: Any, fakes: Any) -> None:
    request = pb.DifferentiateFunctionRequest(
        derivative=pb.DERIVATIVE_JVP, wrt=[0], differentiated_outputs=1, strict=True, seed=7
    )
    request.function.digest = "0" * 64
    codec.encode_batch(Batch((fakes.two_floats(),)), request.batch)
    upload = await frontend.upload(fakes.two_floats(b"v" * 8))
    request.vectors.add(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1, 2], handle=f"{upload}/tensors/0")
    reply = codec.decode_derivative_result(await frontend.stub.DifferentiateFunction(request))
    assert reply.outputs == ((fakes.two_floats(),),)
    assert reply.derivatives == (fakes.two_floats(), fakes.two_floats(b"y" * 8))
    assert reply.timing.total > 0
    function, query, vectors = frontend.cluster.functions[0]
    assert (function.digest, query.kind, query.strict, query.seed, vectors) == ("0" * 64, "jvp", True, 7, [b"v" * 8])


async def test_derivatives_that_are_large_wait_to_be_downloaded(frontend: Any, fakes: Any) -> None:
    request = pb.DifferentiateFunctionRequest(
        derivative=pb.DERIVATIVE_JACOBIAN, wrt=[0], differentiated_outputs=1, max_inline_bytes=8
    )
    request.function.digest = "0" * 64
    codec.encode_batch(Batch((fakes.two_floats(),)), request.batch)
    reply = await frontend.stub.DifferentiateFunction(request)
    (download,) = {each.handle.partition("/tensors/")[0] for each in reply.derivatives}
    assert (await frontend.download(download)).endswith(bytes(fakes.two_floats().data) + b"y" * 8)


async def test_vectors_of_hessian_products_reach_the_ranks(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = pb.ComputeGradientsRequest(name="models/m")
    codec.encode_batch(Batch(fakes.two_floats()), request.batch)
    upload = await frontend.upload(fakes.two_floats(b"v" * 8))
    tensor = request.vectors.add(name="w").tensor
    tensor.dtype, tensor.handle = tensor_pb2.DTYPE_FLOAT32, f"{upload}/tensors/0"
    tensor.shape.extend([1, 2])
    await frontend.stub.ComputeGradients(request)
    (name, query, vectors), *_ = workers.calls
    assert (name, query.per_example, vectors) == ("compute_gradients", False, {"w": b"v" * 8})


async def test_a_function_is_cut_when_its_caller_gives_up_and_the_next_is_served(frontend: Any, fakes: Any) -> None:
    request = pb.ComputeGradientsRequest(input_gradients=True, no_parameter_gradients=True)
    request.function.digest = "0" * 64
    codec.encode_batch(Batch((fakes.two_floats(),)), request.batch)
    frontend.cluster.gate.clear()
    endless = frontend.stub.ComputeGradients(request)
    await frontend.until(lambda: len(frontend.cluster.functions) == 1)
    following = asyncio.ensure_future(frontend.stub.ComputeGradients(request))
    endless.cancel()
    await frontend.until(lambda: len(frontend.cluster.functions) == 2)
    frontend.cluster.gate.set()
    assert codec.decode_gradient_result(await following).loss == 2.0


async def test_request_must_say_what_to_differentiate(frontend: Any, fakes: Any) -> None:
    request = pb.ComputeGradientsRequest()
    codec.encode_batch(Batch(fakes.two_floats()), request.batch)
    assert (await frontend.error(frontend.stub.ComputeGradients(request))).field == "name"
