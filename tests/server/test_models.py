"""Models come, are listed, and go, and leave nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


def delete(frontend: Any, model_id: str = "m") -> Any:
    return frontend.stub.DeleteModel(pb.DeleteModelRequest(name=f"models/{model_id}"))


async def test_created_model_is_described(frontend: Any) -> None:
    model = await frontend.stub.CreateModel(frontend.creation(labels={"team": "a"}, seed=7))
    assert model == await frontend.model()
    assert (model.name, model.state, model.parameter_count) == ("models/m", model_pb2.MODEL_STATE_READY, 2)
    assert (model.seed, dict(model.labels), model.sharding.reason) == (7, {"team": "a"}, "fake")
    assert [tensor.name for tensor in model.tensors] == ["w"]
    assert not model.variants[0].HasField("graph") and model.create_time.seconds > 0


async def test_server_chooses_an_id_where_none_is_given(frontend: Any) -> None:
    first, second = [await frontend.stub.CreateModel(frontend.creation("")) for _ in range(2)]
    assert first.name != second.name and first.name.startswith("models/model-")


async def test_bad_and_taken_ids_are_refused(frontend: Any) -> None:
    for model_id in ("A", "1a", "a_b", "a" * 64, "é", "a/b"):
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation(model_id)))
        assert (error.reason, error.field) == ("MODEL_ID_INVALID", "model_id")
    await frontend.create()
    error = await frontend.error(frontend.stub.CreateModel(frontend.creation()))
    assert (error.reason, error.field, error.resource) == ("MODEL_EXISTS", "model_id", "models/m")


async def test_unknown_model_is_not_found(frontend: Any) -> None:
    for call in (
        frontend.stub.GetModel(pb.GetModelRequest(name="models/none")),
        frontend.stub.TrainStep(frontend.train(model_id="none")),
        delete(frontend, "none"),
    ):
        error = await frontend.error(call)
        assert (error.reason, error.field, error.resource) == ("MODEL_NOT_FOUND", "name", "models/none")


async def test_lists_are_paged_in_order_while_models_come_and_go(frontend: Any) -> None:
    for model_id in ("d", "b", "a", "e", "c"):
        await frontend.create(model_id)
    first = await frontend.stub.ListModels(pb.ListModelsRequest(page_size=2))
    await delete(frontend, "b")
    await frontend.create("aa")
    second = await frontend.stub.ListModels(pb.ListModelsRequest(page_size=2, page_token=first.next_page_token))
    third = await frontend.stub.ListModels(pb.ListModelsRequest(page_size=2, page_token=second.next_page_token))
    pages = [[model.name.removeprefix("models/") for model in page.models] for page in (first, second, third)]
    assert pages == [["a", "b"], ["c", "d"], ["e"]]
    assert not third.next_page_token and not first.models[0].tensors and not first.models[0].variants
    everything = await frontend.stub.ListModels(pb.ListModelsRequest(page_size=5000))
    assert len(everything.models) == 5 and not everything.next_page_token


async def test_bad_pages_are_refused(frontend: Any) -> None:
    error = await frontend.error(frontend.stub.ListModels(pb.ListModelsRequest(page_size=-1)))
    assert (error.reason, error.field) == ("PAGE_SIZE_INVALID", "page_size")
    for token in ("x", "é", "////", "QUJD"):
        error = await frontend.error(frontend.stub.ListModels(pb.ListModelsRequest(page_token=token)))
        assert (error.reason, error.field) == ("PAGE_TOKEN_INVALID", "page_token")


async def test_models_is_a_limit_with_a_name(start: Any) -> None:
    async with start(models=2) as frontend:
        frontend.cluster.gate.clear()
        first = asyncio.ensure_future(frontend.stub.CreateModel(frontend.creation("a")))
        await frontend.until(lambda: frontend.cluster.starting)
        frontend.cluster.gate.set()
        await first
        await frontend.create("b")
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation("c")))
        assert error.reason == "TOO_MANY_MODELS" and "setting models" in error.message
        await delete(frontend, "a")
        await frontend.create("c")


async def test_repeated_creation_joins_the_first(frontend: Any, fakes: Any) -> None:
    frontend.cluster.gate.clear()
    request = frontend.creation(request_id=fakes.request_id())
    first = asyncio.ensure_future(frontend.stub.CreateModel(request))
    await frontend.until(lambda: frontend.cluster.starting)
    second = asyncio.ensure_future(frontend.stub.CreateModel(request))
    name = f"models/m/commands/{request.request_id}"
    running = await frontend.stub.GetCommand(pb.GetCommandRequest(name=name))
    assert running.state == model_pb2.COMMAND_STATE_RUNNING
    frontend.cluster.gate.set()
    assert await first == await second == await frontend.stub.CreateModel(request)
    ended = await frontend.stub.GetCommand(pb.GetCommandRequest(name=name, wait=True))
    assert ended.state == model_pb2.COMMAND_STATE_APPLIED and len(frontend.cluster.groups) == 1


async def test_creations_with_one_request_id_at_once_make_one_model(frontend: Any, fakes: Any) -> None:
    request = frontend.creation("", request_id=fakes.request_id())
    models = await asyncio.gather(*(frontend.stub.CreateModel(request) for _ in range(5)))
    assert len({model.name for model in models}) == len(frontend.cluster.groups) == 1


async def test_cancelled_creation_cleans_up_and_can_be_repeated(frontend: Any, fakes: Any) -> None:
    name = await frontend.upload(fakes.two_floats())
    request = frontend.creation(request_id=fakes.request_id())
    request.tensors[0].tensor.handle = f"{name}/tensors/0"
    frontend.cluster.gate.clear()
    call = frontend.stub.CreateModel(request)
    await frontend.until(lambda: frontend.cluster.starting)
    assert (await frontend.model()).state == model_pb2.MODEL_STATE_CREATING
    error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
    assert error.reason == "MODEL_NOT_READY" and error.retryable
    call.cancel()
    await frontend.until(lambda: not frontend.cluster.starting)
    assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models
    frontend.cluster.gate.set()
    assert (await frontend.stub.CreateModel(request)).state == model_pb2.MODEL_STATE_READY
    assert frontend.cluster.values == {"w": bytes(fakes.two_floats().data)} and not frontend.files


async def test_failed_creation_leaves_nothing(frontend: Any, fakes: Any) -> None:
    frontend.cluster.error = ResourceExhausted("2 ranks wanted, 1 is free", field="model.workers", reason="WORKERS")
    request = frontend.creation(request_id=fakes.request_id())
    error = await frontend.error(frontend.stub.CreateModel(request))
    assert (error.reason, error.field, error.request_id) == ("WORKERS", "model.workers", request.request_id)
    assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models
    frontend.cluster.error = None
    await frontend.create()


async def test_delete_refuses_what_waits_and_lets_what_runs_end(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
    await frontend.until(lambda: workers.busy)
    waiting = asyncio.ensure_future(frontend.error(frontend.stub.TrainStep(frontend.train())))
    await asyncio.sleep(0.05)
    deletions = [asyncio.ensure_future(delete(frontend)) for _ in range(2)]
    error = await waiting
    assert (error.reason, error.outcome) == ("MODEL_DELETED", "not_applied")
    assert (await frontend.model()).state == model_pb2.MODEL_STATE_DELETING
    assert (await frontend.error(frontend.stub.TrainStep(frontend.train()))).reason == "MODEL_DELETED"
    assert not any(deletion.done() for deletion in deletions)
    workers.gate.set()
    assert (await running).result.step == 1
    await asyncio.gather(*deletions)
    assert workers.closed == [True]
    assert (await frontend.error(frontend.stub.TrainStep(frontend.train()))).reason == "MODEL_NOT_FOUND"


async def test_delete_ends_a_creation(frontend: Any) -> None:
    frontend.cluster.gate.clear()
    creation = asyncio.ensure_future(frontend.error(frontend.stub.CreateModel(frontend.creation())))
    await frontend.until(lambda: frontend.cluster.starting)
    await delete(frontend)
    assert (await creation).reason == "CANCELLED" and not frontend.cluster.starting
    assert (await frontend.error(delete(frontend))).reason == "MODEL_NOT_FOUND"


async def test_deletion_that_names_a_creation_spares_a_model_of_another(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        mine = frontend.creation(request_id=fakes.request_id())
        await frontend.stub.CreateModel(mine)

        def delete_made_by(made_by: str) -> Any:
            return frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m", made_by=made_by))

        error = await frontend.error(delete_made_by(fakes.request_id()))
        assert (error.reason, error.field, error.resource) == ("MODEL_NOT_FOUND", "made_by", "models/m")
        assert (await frontend.error(delete_made_by("mine"))).reason == "REQUEST_ID_INVALID"
        assert (await frontend.model()).state == model_pb2.MODEL_STATE_READY
        await delete_made_by(mine.request_id)
        assert (await frontend.error(frontend.model())).reason == "MODEL_NOT_FOUND"
        # Made anew by another: the first creation's clean-up does not concern it.
        await frontend.stub.CreateModel(another := frontend.creation(request_id=fakes.request_id()))
        assert (await frontend.error(delete_made_by(mine.request_id))).reason == "MODEL_NOT_FOUND"
    async with start() as frontend:
        assert (await frontend.error(delete_made_by(mine.request_id))).reason == "MODEL_NOT_FOUND"
        await delete_made_by(another.request_id)
        assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models


async def test_deletion_ends_a_creation_that_it_names(frontend: Any, fakes: Any) -> None:
    frontend.cluster.gate.clear()
    request = frontend.creation(request_id=fakes.request_id())
    creation = asyncio.ensure_future(frontend.error(frontend.stub.CreateModel(request)))
    await frontend.until(lambda: frontend.cluster.starting)
    await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m", made_by=request.request_id))
    assert (await creation).reason == "CANCELLED" and not frontend.cluster.starting


async def test_repeated_deletion_leaves_alone_what_was_made_since(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    deletion = pb.DeleteModelRequest(name="models/m", request_id=fakes.request_id())
    await frontend.stub.DeleteModel(deletion)
    await frontend.stub.DeleteModel(deletion)
    await frontend.create()
    await frontend.stub.DeleteModel(deletion)
    assert (await frontend.model()).state == model_pb2.MODEL_STATE_READY
    deletion.request_id = fakes.request_id()
    await frontend.stub.DeleteModel(deletion)
    assert (await frontend.error(frontend.model())).reason == "MODEL_NOT_FOUND"


async def test_deletion_that_found_nothing_is_carried_out_when_it_is_repeated(frontend: Any, fakes: Any) -> None:
    deletion = pb.DeleteModelRequest(name="models/m", request_id=fakes.request_id())
    assert (await frontend.error(frontend.stub.DeleteModel(deletion))).reason == "MODEL_NOT_FOUND"
    await frontend.create()
    await frontend.stub.DeleteModel(deletion)
    assert (await frontend.error(frontend.model())).reason == "MODEL_NOT_FOUND"


async def test_delete_kills_the_ranks_of_a_command_that_does_not_end(start: Any) -> None:
    async with start(delete_seconds=0.2) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
        await frontend.until(lambda: workers.busy)
        await asyncio.wait_for(frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m")), 3)
        assert workers.closed == [False], "their processes end"
        assert (await frontend.error(running)).outcome == "unknown"
        assert (await frontend.error(frontend.model())).reason == "MODEL_NOT_FOUND"


async def test_delete_lets_a_command_end_that_does_so_in_time(start: Any) -> None:
    async with start(delete_seconds=5) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
        await frontend.until(lambda: workers.busy)
        deletion = asyncio.ensure_future(frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m")))
        await asyncio.sleep(0.05)
        workers.gate.set()
        await deletion
        assert (await running).result.step == 1 and workers.closed == [True]
