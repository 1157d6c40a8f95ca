"""Resource names are read and written in one form."""

from __future__ import annotations

import pytest

from gradwire_proto import names
from gradwire_proto.errors import CheckpointNotFound, InvalidArgument, ModelNotFound

REQUEST_ID = "5f8d1c1e-5c9c-4d0e-9a53-6b1f2c3d4e5f"


def test_names_come_back_in_their_parts() -> None:
    assert names.parse_model_name(names.model_name("digits-2")) == "digits-2"
    assert names.parse_command_name(names.command_name("digits", REQUEST_ID)) == ("digits", REQUEST_ID)
    assert names.parse_handle_name(names.handle_name("uploads/a_B-1", 12)) == ("uploads/a_B-1", 12)
    assert names.parse_checkpoint_name(names.checkpoint_name("0-best")) == "0-best"
    automatic = names.automatic_checkpoint("digits", 120)
    assert names.checkpoint_name(automatic) == "models/digits/checkpoints/120"
    assert names.parse_checkpoint_name("models/digits/checkpoints/120") == automatic
    upload = names.upload_name(names.check_upload_id(REQUEST_ID.upper()) or "")
    assert names.parse_handle_name(names.handle_name(upload, 3)) == (f"uploads/{REQUEST_ID}", 3)


@pytest.mark.parametrize("name", ["", "digits", "models/", "models", "model/a", "models/a/b", "Models/a"])
def test_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.parse_model_name(name)
    assert (caught.value.field, caught.value.reason) == ("name", "NAME_INVALID")


@pytest.mark.parametrize("name", ["models/UPPER", "models/1st", "models/-", "models/" + "a" * 64, "models/a.b"])
def test_model_that_no_id_can_name_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        names.parse_model_name(name)
    assert caught.value.resource == name


@pytest.mark.parametrize("name", ["models/a", "models/a/commands/", "models/a/commands/7", "a/commands/" + REQUEST_ID])
def test_command_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        names.parse_command_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "uploads/a",
        "uploads//tensors/0",
        "files/a/tensors/0",
        "uploads/a/b/tensors/0",
        "uploads/a/tensors/",
        "uploads/a/tensors/٣",
        "uploads/a/tensors/1e3",
        "uploads/a/tensors/1234567890",
    ],
)
def test_handle_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        names.parse_handle_name(name)


@pytest.mark.parametrize(
    "name", ["", "c", "checkpoints", "checkpoints/", "models/m", "models//checkpoints/1", "x/c/d/1"]
)
def test_checkpoint_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.parse_checkpoint_name(name)
    assert caught.value.reason == "NAME_INVALID"


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/A",
        "checkpoints/..",
        "checkpoints/" + "a" * 64,
        "models/m/checkpoints/01",
        "models/../checkpoints/1",
    ],
)
def test_checkpoint_that_no_name_can_have_is_not_found(name: str) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        names.parse_checkpoint_name(name)
    assert caught.value.resource == name


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "a" * 64, "a\n", "..", "m/", "m/x", "m/-1", "M/1", "m/1/2", "m/01", None]
)
def test_name_that_no_checkpoint_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        names.checkpoint_name(name)


@pytest.mark.parametrize("model_id", ["", "A", "1a", "a_b", "a" * 64, "a\n"])
def test_model_id_of_another_form_is_refused(model_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.check_model_id(model_id)
    assert (caught.value.field, caught.value.reason) == ("model_id", "MODEL_ID_INVALID")
    assert names.check_model_id("a" * 63) == "a" * 63


def test_request_id_is_a_uuid_whatever_its_case() -> None:
    assert names.check_request_id("") is None and names.check_upload_id("") is None
    assert names.check_request_id(REQUEST_ID.upper()) == REQUEST_ID
    for bad in ("7", REQUEST_ID[:-1], REQUEST_ID.replace("-", ""), "{" + REQUEST_ID + "}", "z" * 36):
        with pytest.raises(InvalidArgument) as caught:
            names.check_request_id(bad)
        assert caught.value.reason == "REQUEST_ID_INVALID"
