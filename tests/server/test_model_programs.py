"""What a model's program may be: graphs within limits, more of them later, or a module by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradwire_proto import codec
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import ArchitectureSpec, Batch, GraphLossSpec, StateTensor, TensorData


async def test_values_must_be_those_that_the_program_names(frontend: Any) -> None:
    def wrong(change: Any) -> Any:
        request = frontend.creation()
        change(request)
        return frontend.error(frontend.stub.CreateModel(request))

    missing = await wrong(lambda request: request.ClearField("tensors"))
    assert (missing.reason, missing.field) == ("VALUE_MISSING", 'tensors["w"]')
    unknown = await wrong(lambda request: request.tensors.add(name="v").tensor.CopyFrom(request.tensors[0].tensor))
    assert (unknown.reason, unknown.field) == ("VALUE_UNKNOWN", 'tensors["v"]')
    shaped = await wrong(
        lambda request: codec.encode_tensor(TensorData("float32", (1,), b"1234"), request.tensors[0].tensor)
    )
    assert (shaped.reason, shaped.field) == ("TENSOR_SIZE_MISMATCH", 'tensors["w"]') or shaped.field == 'tensors["w"]'
    assert not frontend.cluster.groups


async def test_operator_outside_the_allowlist_is_refused_by_path(frontend: Any) -> None:
    request = frontend.creation()
    request.model.program.graphs.variants[0].graph.nodes[0].operator = "aten.from_file.default"
    error = await frontend.error(frontend.stub.CreateModel(request))
    assert error.reason == "OPERATOR_NOT_ALLOWED" and "aten.from_file.default" in error.message
    assert error.field == "model.program.graphs.variants[0].graph.nodes[0].operator"


async def test_graph_and_model_sizes_are_limits_with_names(start: Any) -> None:
    async with start(model_bytes=7) as frontend:
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation()))
        assert error.reason == "MODEL_TOO_LARGE" and "model_bytes" in error.message
    async with start(tensor_bytes=7) as frontend:
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation()))
        assert error.reason == "TENSOR_TOO_LARGE" and "tensor_bytes" in error.message
    async with start(graph_nodes=1) as frontend:
        request = frontend.creation()
        graph = request.model.program.graphs.variants[0].graph
        graph.nodes.add().CopyFrom(graph.nodes[0])
        graph.nodes[1].name = "z"
        error = await frontend.error(frontend.stub.CreateModel(request))
        assert error.reason == "GRAPH_TOO_LARGE" and "graph_nodes" in error.message


def addition(fakes: Any, name: str) -> pb.AddVariantRequest:
    request = pb.AddVariantRequest(name="models/m")
    codec.encode_variant(fakes.variant(name), request.variant)
    return request


async def test_variants_are_added_once_under_each_name_and_up_to_a_limit(start: Any, fakes: Any) -> None:
    async with start(variants=3) as frontend:
        workers = await frontend.create()
        model = await frontend.stub.AddVariant(addition(fakes, "longer"))
        assert [variant.name for variant in model.variants] == ["train", "longer"]
        error = await frontend.error(frontend.stub.AddVariant(addition(fakes, "longer")))
        assert (error.reason, error.field) == ("VARIANT_EXISTS", "variant.name")
        await frontend.stub.AddVariant(addition(fakes, "longest"))
        error = await frontend.error(frontend.stub.AddVariant(addition(fakes, "again")))
        assert error.reason == "TOO_MANY_VARIANTS" and "variants" in error.message
        assert [call[1] for call in workers.calls] == ["longer", "longest"]


async def test_repeated_variant_gets_the_first_answer(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = addition(fakes, "longer")
    request.request_id = fakes.request_id()
    assert await frontend.stub.AddVariant(request) == await frontend.stub.AddVariant(request)
    assert len(workers.calls) == 1


def architecture(fakes: Any, **changes: Any) -> Any:
    """A request for a model that the ranks build."""
    request = pb.CreateModelRequest(model_id="built")
    spec = fakes.model_spec(program=ArchitectureSpec(name="torch.nn.Linear", config={"in_features": 2}), **changes)
    codec.encode_model_spec(spec, request.model)
    return request


async def test_what_the_ranks_built_is_described_as_they_say(frontend: Any, fakes: Any) -> None:
    tensors = (StateTensor(name="weight", role="parameter", dtype="float32", shape=(1, 2), requires_grad=True),)
    frontend.cluster.built = (tensors, (replace(fakes.variant("train-0"), graph=None),))
    info = codec.decode_model_info(await frontend.stub.CreateModel(architecture(fakes)))
    assert (info.architecture, info.num_parameters, info.tensors) == ("torch.nn.Linear", 2, tensors)
    assert [variant.name for variant in info.variants] == ["train-0"]


async def test_an_architecture_takes_no_values_graphs_variants_or_tensors_in_its_config(
    frontend: Any, fakes: Any
) -> None:
    request = architecture(fakes)
    codec.encode_named_tensors({"w": fakes.two_floats()}, request.tensors)
    error = await frontend.error(frontend.stub.CreateModel(request))
    assert (error.reason, error.field) == ("VALUE_UNKNOWN", 'tensors["w"]')
    error = await frontend.error(frontend.stub.CreateModel(architecture(fakes, loss=GraphLossSpec())))
    assert (error.reason, error.field) == ("LOSS_DOES_NOT_FIT", "model.loss.graph")
    request = architecture(fakes)
    codec.encode_options({"weight": [fakes.two_floats()]}, request.model.program.architecture.config)
    error = await frontend.error(frontend.stub.CreateModel(request))
    assert (error.reason, error.field) == ("ARCHITECTURE_INVALID", "model.program.architecture.config.weight[0]")
    await frontend.stub.CreateModel(architecture(fakes))
    addition_to_it = addition(fakes, "longer")
    addition_to_it.name = "models/built"
    error = await frontend.error(frontend.stub.AddVariant(addition_to_it))
    assert (error.reason, error.field) == ("VARIANT_NOT_TAKEN", "variant")


async def test_an_architecture_is_bounded_in_depth_and_is_no_function(frontend: Any, fakes: Any) -> None:
    request = architecture(fakes)
    value = request.model.program.architecture.config.entries.add(key="layers").value
    for _ in range(codec.MAX_DEPTH + 1):
        value = value.list.items.add()
    value.integer = 1
    error = await frontend.error(frontend.stub.CreateModel(request))
    assert error.reason == "NESTING_TOO_DEEP"
    function = pb.ComputeGradientsRequest()
    function.function.digest = "0" * 64
    function.function.program.architecture.name = "torch.nn.Linear"
    codec.encode_batch(Batch((fakes.two_floats(),)), function.batch)
    error = await frontend.error(frontend.stub.ComputeGradients(function))
    assert (error.reason, error.field) == ("FIELD_MISSING", "function.program.graphs")
