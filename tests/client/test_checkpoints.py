"""Checkpoints as users and scripts see them: what the calls send, what they make of the answers, and exit codes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from google.protobuf.empty_pb2 import Empty
from torch import nn
from typer.testing import CliRunner, Result

import gradwire
from gradwire import errors
from gradwire.cli import app
from gradwire_proto import codec
from gradwire_proto.names import parse_checkpoint_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Checkpoint, ModelInfo

BEST = Checkpoint(
    name="best", model_id="mine", step=40, command=44, created_at=1.5e9, nbytes=2_500_000, automatic=False
)
AUTOMATIC = Checkpoint(
    name="mine/100", model_id="mine", step=90, command=100, created_at=1.6e9, nbytes=3_000, automatic=True
)
INFO = ModelInfo(
    id="mine",
    state="ready",
    step=0,
    workers=2,
    sharding=None,
    num_parameters=8,
    optimizer=None,
    loss=None,
    labels={},
    created_at=1.5,
)


class Shelf:
    """Holds checkpoints by name, a page of one at a time, and makes models of them."""

    def __init__(self, scripted) -> None:
        self.checkpoints = {each.name: each for each in (BEST, AUTOMATIC)}
        scripted.answers |= {
            "CreateCheckpoint": self.create,
            "GetCheckpoint": lambda request, context: codec.encode_checkpoint(self.find(request.name)),
            "ListCheckpoints": self.page,
            "DeleteCheckpoint": self.delete,
            "RestoreModel": self.restore,
        }

    def find(self, name: str) -> Checkpoint:
        found = self.checkpoints.get(parse_checkpoint_name(name))
        if found is None:
            raise errors.CheckpointNotFound(f"there is no {name}", resource=name)
        return found

    def create(self, request, context):
        model_id, name = codec.decode_new_checkpoint(request)
        if name in self.checkpoints:
            raise errors.AlreadyExists(f"{name} is there", reason="CHECKPOINT_EXISTS")
        saved = Checkpoint(
            name=name or "chosen", model_id=model_id, step=1, command=1, created_at=1.7e9, nbytes=5, automatic=False
        )
        self.checkpoints[saved.name] = saved
        return codec.encode_checkpoint(saved)

    def page(self, request, context):
        names = sorted(self.checkpoints)
        index = int(request.page_token or 0)
        found = codec.encode_checkpoint(self.checkpoints[names[index]])
        more = str(index + 1) if index + 1 < len(names) else ""
        return pb.ListCheckpointsResponse(checkpoints=[found], next_page_token=more)

    def delete(self, request, context):
        assert request.request_id, "a repeat would delete what was saved since"
        del self.checkpoints[self.find(request.name).name]
        return Empty()

    def restore(self, request, context):
        name, model_id, workers = codec.decode_restoration(request)
        saved, step = self.find(request.checkpoint), self.checkpoints[name].step
        return codec.encode_model_info(replace(INFO, id=model_id or saved.model_id, step=step, workers=workers or 2))


@pytest.fixture
def shelf(scripted) -> Shelf:
    return Shelf(scripted)


@pytest.fixture
def sdk(scripted) -> Iterator[gradwire.Client]:
    with gradwire.connect(scripted.target, timeout=5) as sdk:
        yield sdk


@pytest.fixture
def model(held_model) -> gradwire.Model:
    return held_model(nn.Linear(2, 1), "mse_loss", (torch.zeros(3, 2), torch.zeros(3, 1)))


def test_model_is_saved_under_a_name_or_one_that_the_service_chooses(model, shelf, scripted):
    saved = model.save("epoch-1")
    assert (saved.name, saved.model_id, saved.created_at, saved.nbytes) == ("epoch-1", "mine", 1.7e9, 5)
    assert model.futures.save().result(5).name == "chosen"
    first, second = scripted.requests("CreateCheckpoint")
    assert first.parent == "models/mine" and first.request_id != second.request_id != ""


def test_name_that_is_taken_already_exists(model, shelf):
    with pytest.raises(errors.AlreadyExists):
        model.save("best")


@pytest.mark.parametrize("name", ["", "Best", "a/b", "../x", "a" * 64, 5])
def test_name_that_no_checkpoint_can_have_is_refused_before_anything_is_sent(model, scripted, name):
    with pytest.raises(errors.InvalidArgument) as caught:
        model.save(name)
    assert caught.value.field == "name" and scripted.requests("CreateCheckpoint") == []


def test_save_whose_answer_is_lost_saves_once(held_model, shelf, scripted):
    model = held_model(nn.Linear(2, 1), "mse_loss", (torch.zeros(3, 2), torch.zeros(3, 1)))
    ids = []

    def lose_the_first(request, context):
        ids.append(request.request_id)
        if len(ids) == 1:
            raise errors.Unavailable("is brought back", reason="MODEL_RECOVERING")
        return shelf.create(request, context)

    scripted.answers["CreateCheckpoint"] = lose_the_first
    assert model.save("epoch-1").name == "epoch-1"
    assert len(ids) == 2 and len(set(ids)) == 1


def test_checkpoints_are_listed_over_all_pages_found_and_deleted(sdk, shelf, scripted):
    assert sdk.list_checkpoints() == [BEST, AUTOMATIC]
    assert len(scripted.requests("ListCheckpoints")) == 2
    assert sdk.get_checkpoint("best") == BEST and sdk.get_checkpoint("mine/100") == AUTOMATIC
    assert scripted.requests("GetCheckpoint")[-1].name == "models/mine/checkpoints/100"
    sdk.delete_checkpoint("best")
    sdk.delete_checkpoint(AUTOMATIC)
    assert shelf.checkpoints == {}
    with pytest.raises(errors.CheckpointNotFound):
        sdk.get_checkpoint("best")
    with pytest.raises(errors.CheckpointNotFound):
        sdk.delete_checkpoint("best")


@pytest.mark.parametrize("checkpoint", ["best", BEST])
def test_model_is_restored_under_the_id_of_the_saved_one(sdk, shelf, scripted, checkpoint):
    assert sdk.restore_model(checkpoint).id == "mine"
    (request,) = scripted.requests("RestoreModel")
    assert (request.checkpoint, request.model_id, request.workers) == ("checkpoints/best", "mine", 0)
    assert request.request_id


def test_model_is_restored_under_another_id_on_other_ranks(sdk, shelf, scripted):
    assert sdk.restore_model("mine/100", model_id="copy", workers=3).id == "copy"
    (request,) = scripted.requests("RestoreModel")
    assert request.checkpoint == "models/mine/checkpoints/100"
    assert (request.model_id, request.workers) == ("copy", 3)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"checkpoint": 5}, "checkpoint"),
        ({"checkpoint": "No"}, "checkpoint"),
        ({"checkpoint": "best", "workers": 0}, "workers"),
        ({"checkpoint": "best", "workers": True}, "workers"),
        ({"checkpoint": "best", "model_id": "9"}, "model_id"),
    ],
)
def test_restoration_with_a_wrong_argument_is_refused_by_its_name(sdk, shelf, scripted, arguments, field):
    with pytest.raises(errors.InvalidArgument) as caught:
        sdk.restore_model(**arguments)
    assert caught.value.field == field and scripted.requests("RestoreModel") == []


def test_looking_up_the_saved_model_is_part_of_the_time_to_restore_it(shelf, scripted):
    find = scripted.answers["GetCheckpoint"]
    scripted.answers["GetCheckpoint"] = lambda request, context: scripted.release.wait(1.2) or find(request, context)
    scripted.answers["RestoreModel"] = lambda request, context: scripted.release.wait(10) and Empty()
    with gradwire.connect(scripted.target, timeout=2.0) as sdk:
        start = time.monotonic()
        with pytest.raises(errors.GradwireError):
            sdk.restore_model("mine/100")
        assert scripted.requests("RestoreModel") and time.monotonic() - start < 2.0 + 0.7


def test_restoration_that_may_have_happened_is_undone_within_its_time(shelf, scripted):
    """Nobody would hold the model, and its ranks would be taken."""
    scripted.answers["RestoreModel"] = lambda request, context: scripted.release.wait(10) and Empty()
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(
        state=model_pb2.COMMAND_STATE_APPLIED, name=request.name
    )
    scripted.answers["DeleteModel"] = lambda request, context: Empty()
    with gradwire.connect(scripted.target, timeout=1.5) as sdk:
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded) as caught:
            sdk.restore_model(BEST, model_id="again")
        assert time.monotonic() - start < 1.5 + 0.7
    assert caught.value.outcome == "applied"
    (undo,), (restoration,) = scripted.requests("DeleteModel"), scripted.requests("RestoreModel")
    # Somebody else's model may have the id by then.
    assert (undo.name, undo.made_by) == ("models/again", restoration.request_id)


@pytest.mark.parametrize(
    ("state", "outcome", "words"),
    [
        (model_pb2.COMMAND_STATE_RUNNING, "unknown", "it may be applied yet"),
        (model_pb2.COMMAND_STATE_APPLIED, "applied", "it was applied"),
    ],
)
def test_save_that_takes_longer_than_its_call_says_whether_the_checkpoint_may_be_there(scripted, state, outcome, words):
    scripted.answers["CreateCheckpoint"] = lambda request, context: scripted.release.wait(10) and Empty()
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(name=request.name, state=state)
    with gradwire.connect(scripted.target, timeout=1.0) as sdk:
        scripted.answers["GetModel"] = lambda request, context: codec.encode_model_info(INFO)
        with pytest.raises(errors.DeadlineExceeded, match=words) as caught:
            sdk.get_model("mine").save("best")
    (saved,), asked = scripted.requests("CreateCheckpoint"), scripted.requests("GetCommand")
    assert {each.name for each in asked} == {f"models/mine/commands/{saved.request_id}"}
    assert (caught.value.outcome, caught.value.request_id) == (outcome, saved.request_id)


def test_restoration_under_an_id_that_is_taken_deletes_nothing(sdk, shelf, scripted):
    def refuse(request, context):
        raise errors.AlreadyExists("there is one", reason="MODEL_EXISTS", outcome="unknown")

    scripted.answers["RestoreModel"] = refuse
    with pytest.raises(errors.AlreadyExists):
        sdk.restore_model("best")
    assert scripted.requests("DeleteModel") == []


def test_checkpoint_that_is_not_there_is_not_restored(sdk, shelf):
    with pytest.raises(errors.CheckpointNotFound):
        sdk.restore_model("none")


@pytest.fixture
def command(scripted) -> Callable[..., Result]:
    """Runs `gradwire checkpoints` in this process, where torch is imported already."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["checkpoints", *arguments, "--target", scripted.target], env={"COLUMNS": "120"})

    return run


def test_command_line_lists_shows_and_deletes_checkpoints(shelf, command):
    listed = json.loads(command("list", "--json").stdout)
    assert [(each["name"], each["automatic"]) for each in listed] == [("best", False), ("mine/100", True)]
    table = command("list").stdout
    assert all(part in table for part in ("best", "mine/100", "2.5 MB", "40"))
    shown = json.loads(command("show", "best", "--json").stdout)
    assert (shown["model"], shown["step"], shown["command"], shown["nbytes"]) == ("mine", 40, 44, 2_500_000)
    assert "2500000" in command("show", "best").stdout
    deleted = command("delete", "best")
    assert (deleted.exit_code, deleted.stdout) == (0, "") and "best" in deleted.stderr
    assert list(shelf.checkpoints) == ["mine/100"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["show", "none"], 4), (["delete", "none"], 4), (["show", "NO"], 2), (["shw"], 2)]
)
def test_command_that_fails_says_so_by_its_exit_code(shelf, command, arguments, code):
    failed = command(*arguments)
    assert failed.exit_code == code
    assert failed.stdout == "" and failed.stderr
