"""Owners beside each other: what each has, keeps over restarts, and may use up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from certificates import needs_openssl
from server.small_models import two_floats

from gradwire_proto.errors import ModelNotFound, ResourceExhausted
from gradwire_proto.token_file import TokenFile
from gradwire_proto.v1 import gradient_service_pb2 as pb

pytestmark = needs_openssl


async def test_models_of_the_same_name_are_two_and_come_back_to_their_owners(locked: Any, tokens: TokenFile) -> None:
    keys = {owner: tokens.create(owner, owner, ["train"])[0] for owner in ("alice", "bob", "default")}
    async with locked() as frontend:
        for steps, token in enumerate(keys.values(), start=1):
            mine = frontend(token)
            await mine.stub.CreateModel(mine.creation("m"))
            for _ in range(steps):
                await mine.stub.TrainStep(mine.train())
        # Ranks of one serve no other.
        assert {*frontend.cluster.others} == {"alice", "bob"} and frontend.cluster.groups.keys() == {"m"}
    async with locked() as frontend:
        for steps, token in enumerate(keys.values(), start=1):
            mine = frontend(token)
            request = pb.GetStateDictRequest(name="models/m")
            assert (await mine.stub.GetStateDict(request)).step == steps


async def test_uploads_and_downloads_are_found_by_their_owner_alone(locked: Any, tokens: TokenFile) -> None:
    alice, bob = (tokens.create(owner, owner, ["train"])[0] for owner in ("alice", "bob"))
    async with locked() as frontend:
        mine, his = frontend(alice), frontend(bob)
        for each in (mine, his):
            await each.stub.CreateModel(each.creation("m"))
        name = await mine.upload(two_floats(), upload_id="0f0f0f0f-0000-4000-8000-000000000000")
        request = his.train()
        request.batch.inputs.tensor.ClearField("content")
        request.batch.inputs.tensor.handle = f"{name}/tensors/0"
        assert isinstance(await his.error(his.stub.TrainStep(request)), ModelNotFound)
        await mine.stub.TrainStep(request)
        reply = await mine.stub.GetStateDict(pb.GetStateDictRequest(name="models/m", max_inline_bytes=1))
        handle = reply.tensors[0].tensor.handle.rpartition("/tensors/")[0]
        assert isinstance(await his.error(his.download(handle)), ModelNotFound)
        assert len(await mine.download(handle)) == 8


async def test_what_one_may_have_is_bounded_and_leaves_the_others_theirs(locked: Any, tokens: TokenFile) -> None:
    alice, bob = (tokens.create(owner, owner, ["train"])[0] for owner in ("alice", "bob"))
    async with locked(owner_models=1, models=2, owner_held_bytes=8) as frontend:
        mine, his = frontend(alice), frontend(bob)
        await mine.stub.CreateModel(mine.creation("a"))
        error = await mine.error(mine.stub.CreateModel(mine.creation("b")))
        assert isinstance(error, ResourceExhausted) and "owner_models" in str(error)
        await mine.upload(two_floats())
        error = await mine.error(mine.upload(two_floats()))
        assert isinstance(error, ResourceExhausted) and "owner_held_bytes" in str(error)
        await his.upload(two_floats())
        await his.stub.CreateModel(his.creation("a"))
        carol = frontend(tokens.create("carol", "carol", ["train"])[0])
        error = await carol.error(carol.stub.CreateModel(carol.creation("a")))
        assert isinstance(error, ResourceExhausted) and "setting models" in str(error)


async def test_requests_of_one_owner_do_not_take_the_places_of_all(locked: Any, tokens: TokenFile) -> None:
    alice, bob = (tokens.create(owner, owner, ["train"])[0] for owner in ("alice", "bob"))
    async with locked(owner_requests_in_flight=1) as frontend:
        mine, his = frontend(alice), frontend(bob)
        await mine.stub.CreateModel(mine.creation("m"))
        frontend.cluster.others["alice"].groups["m"].gate.clear()
        step = mine.stub.TrainStep(mine.train())
        tenant = frontend.service._tenants.of("alice")
        await frontend.until(lambda: tenant.admission.in_flight == 1)
        error = await mine.error(mine.stub.ListModels(pb.ListModelsRequest()))
        assert isinstance(error, ResourceExhausted) and error.reason == "TOO_MANY_REQUESTS" and error.retry_after
        await his.stub.ListModels(pb.ListModelsRequest())
        frontend.cluster.others["alice"].groups["m"].gate.set()
        await step


async def test_folder_that_is_no_owners_is_left_alone(locked: Any, tokens: TokenFile, storage: Path) -> None:
    (storage / "owners" / "Not An Owner").mkdir(parents=True)
    token, _ = tokens.create("alice", "alice", ["read"])
    async with locked() as frontend:
        await frontend(token).stub.ListModels(pb.ListModelsRequest())
    assert (storage / "owners" / "Not An Owner").exists()
